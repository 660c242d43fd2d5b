"""Tests: server.ray."""
