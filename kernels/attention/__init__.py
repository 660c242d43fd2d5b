"""Paged attention over a cached prefix and a tree or causal suffix."""
