"""Measurements of fxquant against its float originals and against torch's own quantization."""
