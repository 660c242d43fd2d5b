"""Tests of server/process/setup."""
