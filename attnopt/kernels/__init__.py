"""What computes an attention: one file a kernel, each from an ``AttentionSpec`` and tensors. Knows nothing of graphs."""
