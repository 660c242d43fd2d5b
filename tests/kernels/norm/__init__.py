"""Tests of kernels/norm."""
