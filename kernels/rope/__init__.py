"""Rotary position embedding, fused with the write into the KV cache."""
