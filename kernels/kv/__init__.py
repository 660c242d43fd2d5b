"""Moves inside the paged cache."""
