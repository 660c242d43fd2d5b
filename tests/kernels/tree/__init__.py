"""Tests of kernels/tree."""
