"""Kernels in whole engines."""
