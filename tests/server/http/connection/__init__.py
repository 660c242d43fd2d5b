"""Tests of server/http/connection."""
