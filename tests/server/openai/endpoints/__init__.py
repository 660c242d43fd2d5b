"""Tests of server/openai/endpoints."""
