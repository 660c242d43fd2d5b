"""What a step is: its plan, its trees, its tensors, and who carries it out."""
