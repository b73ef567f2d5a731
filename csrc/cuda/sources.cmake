# The CUDA kernels: plain C++17, no torch header.
set(FASTKD_CUDA_SOURCES
    csrc/cuda/plan.cpp
    csrc/cuda/launch.cu
    csrc/cuda/tiny.cu
    csrc/cuda/registers.cu
    csrc/cuda/ring.cu
    csrc/cuda/streaming.cu
    csrc/cuda/backward.cu
    csrc/cuda/finish.cu)
