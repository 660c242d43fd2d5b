"""Tests of server/http/monitoring."""
