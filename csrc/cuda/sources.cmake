# The CUDA kernels, which include no torch header.
set(FASTKD_CUDA_SOURCES
    csrc/cuda/launch.cu
    csrc/cuda/short_rows.cu
    csrc/cuda/long_rows.cu
    csrc/cuda/strided.cu
    csrc/cuda/backward.cu
    csrc/cuda/topk.cu
    csrc/cuda/mixture.cu
    csrc/cuda/finish.cu)
