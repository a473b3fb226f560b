"""Kernels written in Triton. Only ``launch`` imports Triton, and only when asked."""
