"""Tests of server/http/request."""
