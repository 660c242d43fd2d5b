"""Several ranks for tests, as processes or as threads."""
