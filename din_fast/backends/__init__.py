"""Backends: each computes the same ops on segments; none knows of modules."""
