"""A head as a differentiable network: its first weights, its unrolled steps and its loss."""
