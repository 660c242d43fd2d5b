"""Readers of answers: calls of tools, reasoning."""
