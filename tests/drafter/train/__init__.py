"""Tests: training of draft heads."""
