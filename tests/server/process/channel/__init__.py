"""Tests of server/process/channel."""
