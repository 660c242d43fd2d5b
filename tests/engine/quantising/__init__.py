"""Tests of engine/quantising."""
