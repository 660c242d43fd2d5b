"""Target models and how their weights are read."""
