"""Blocks shared by all models."""
