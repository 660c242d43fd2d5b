"""Penalties and bias, added to logits."""
