"""Tests of kernels/activation."""
