"""Tiny draft heads, and their training."""
