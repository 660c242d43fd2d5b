"""Tests of server/process/supervision."""
