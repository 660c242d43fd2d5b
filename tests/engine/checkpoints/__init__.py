"""Tests of engine/checkpoints."""
