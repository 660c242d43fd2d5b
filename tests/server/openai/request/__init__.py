"""Tests of server/openai/request."""
