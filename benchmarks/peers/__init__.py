"""The servers that are compared, how they are run, and how far their texts agree."""
