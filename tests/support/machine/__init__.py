"""Pretended devices, guarded memory, threads and compiled kernels."""
