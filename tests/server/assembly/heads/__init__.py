"""Tests of server/assembly/heads."""
