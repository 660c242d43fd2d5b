"""Tests of benchmarks/gpu."""
