"""Kernels of others behind the same contract: one file a backend, with what it takes and what it refuses. Importing them starts nothing."""
