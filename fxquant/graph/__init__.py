"""The graph floor: the op table, reading, editing, capture and verification of torch.fx graphs.

This package is the only code that touches the inside of a ``torch.fx`` graph.
"""
