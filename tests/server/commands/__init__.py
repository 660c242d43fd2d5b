"""Tests: server/commands."""
