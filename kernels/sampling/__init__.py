"""Position-keyed noise and the draw of a token."""
