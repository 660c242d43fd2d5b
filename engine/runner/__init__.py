"""Turns a step plan into device tensors and runs the model on them."""
