"""The one place that joins models, kernels and draft heads into an engine."""
