"""Tests of server/http/routes."""
