"""The target answers prompts, so that a head can learn from what the target writes."""
