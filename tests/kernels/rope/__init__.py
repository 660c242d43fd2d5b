"""Tests of kernels/rope."""
