"""Measurements: a file for each command, and rooms for what they share."""
