"""Tests of engine/speculation."""
