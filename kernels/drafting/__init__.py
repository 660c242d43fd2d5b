"""The small steps between the forwards of a draft head."""
