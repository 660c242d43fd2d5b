"""What the sub-commands of `aerie` do."""
