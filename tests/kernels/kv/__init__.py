"""Tests of kernels/kv."""
