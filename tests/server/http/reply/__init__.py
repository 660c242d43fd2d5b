"""Tests of server/http/reply."""
