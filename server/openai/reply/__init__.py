"""What clients get: a generation, its choices, and the objects in which they are written."""
