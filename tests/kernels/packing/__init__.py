"""Tests of kernels/packing."""
