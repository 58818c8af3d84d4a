"""Kernels that the weight formats share: compiled CPU loops, and Triton on a GPU."""
