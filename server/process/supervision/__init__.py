"""Processes that keep others running."""
