"""Linear layers over packed weights."""
