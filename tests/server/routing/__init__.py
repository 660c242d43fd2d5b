"""Tests: server.routing."""
