"""Kernels in Gluon, Triton's lower dialect, for GPUs of compute capability 9.0 (Hopper)."""
