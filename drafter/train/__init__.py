"""Training of draft heads: answers of the target, their tokens, and the head that learns them."""
