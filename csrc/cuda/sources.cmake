# The CUDA kernels: plain C++17, no torch header. The planner, plan.cpp, is a library of its own, because
# it is built and tested without CUDA too.
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
