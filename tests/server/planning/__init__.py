"""Tests: server/planning."""
