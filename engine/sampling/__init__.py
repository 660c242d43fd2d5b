"""From logits to one token per tree node."""
