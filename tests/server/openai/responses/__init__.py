"""Tests of server/openai/responses."""
