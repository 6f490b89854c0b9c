"""Fusion patterns of users: from a function written like model code to a rule of the engine."""
