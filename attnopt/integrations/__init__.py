"""Where other libraries call attnopt's kernels by themselves. Nothing registers on import."""
