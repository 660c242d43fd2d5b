"""Tests: syncspec."""
