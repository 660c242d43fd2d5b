"""Tests: server/anthropic."""
