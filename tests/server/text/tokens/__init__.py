"""Tests of server/text/tokens."""
