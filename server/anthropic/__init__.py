"""The Messages API of Anthropic, answered as chat is."""
