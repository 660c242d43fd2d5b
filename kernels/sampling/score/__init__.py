"""Log-probabilities of tokens under the raw logits."""
