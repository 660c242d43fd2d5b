"""Tiny models, run directly, and oracles for what they generate."""
