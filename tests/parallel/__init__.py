"""Tests: several ranks."""
