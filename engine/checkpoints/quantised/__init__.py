"""Quantised weights of safetensors files."""
