"""Engines and executors for tests, whole or in part, and their plans."""
