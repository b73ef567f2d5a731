"""Check arguments, choose a kernel, and connect kernels to autograd. This package is private."""
