"""Tests of server/openai/reply."""
