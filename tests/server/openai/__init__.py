"""Tests: server/openai."""
