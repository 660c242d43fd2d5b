"""Chat templates, and where they run: each is a program that came with a model."""
