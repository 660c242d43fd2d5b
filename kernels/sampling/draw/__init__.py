"""From edited logits to one token per row."""
