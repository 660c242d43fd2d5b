"""From a model's files to named tensors."""
