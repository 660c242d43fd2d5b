"""Tests: server/assembly."""
