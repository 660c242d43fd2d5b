"""The Responses API of OpenAI, answered as chat is."""
