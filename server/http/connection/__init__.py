"""One client's connection: what is read from it and written to it."""
