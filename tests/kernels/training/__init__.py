"""Tests of kernels/training."""
