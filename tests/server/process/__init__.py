"""Tests: server/process."""
