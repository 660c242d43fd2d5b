"""From logits to tokens: edits, draws with noise of their position, scores, ranking of drafts."""
