"""Tests of server/text/output."""
