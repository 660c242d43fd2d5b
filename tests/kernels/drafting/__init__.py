"""Tests of kernels/drafting."""
