"""What a model writes, in parts: reasoning, content and calls of tools."""
