"""Servers for tests, scripted and real, and what clients need."""
