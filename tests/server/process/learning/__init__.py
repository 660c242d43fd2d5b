"""Tests of server/process/learning."""
