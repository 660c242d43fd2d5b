"""Training of draft heads on answers of the target."""
