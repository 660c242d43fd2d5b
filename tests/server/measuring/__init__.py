"""Tests: server/measuring."""
