"""Quantization arithmetic on plain tensors; this package knows nothing of graphs."""
