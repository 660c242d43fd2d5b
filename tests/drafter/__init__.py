"""Tests: drafter."""
