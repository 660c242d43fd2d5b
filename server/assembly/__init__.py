"""Joins models, kernels and draft heads into an engine: the one place that does."""
