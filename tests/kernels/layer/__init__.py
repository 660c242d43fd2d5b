"""Tests of kernels/layer."""
