"""Tests of server/process/roles."""
