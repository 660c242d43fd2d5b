"""Files of checkpoints for tests, and a hub that serves them."""
