"""Engines for prompts and engines for decoding: one client for all of them."""
