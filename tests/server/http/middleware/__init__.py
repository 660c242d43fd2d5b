"""Tests of server/http/middleware."""
