# The CUDA kernels, which include no torch header. The planner, plan.cpp, is a separate library, because it is also
# built and tested without CUDA.
set(FASTKD_CUDA_SOURCES
    csrc/cuda/launch.cu
    csrc/cuda/tiny.cu
    csrc/cuda/registers.cu
    csrc/cuda/streaming.cu
    csrc/cuda/strided.cu
    csrc/cuda/backward.cu
    csrc/cuda/topk.cu
    csrc/cuda/mixture.cu
    csrc/cuda/finish.cu)
