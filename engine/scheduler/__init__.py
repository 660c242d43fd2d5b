"""Decides what every step computes. Pure Python, no torch."""
