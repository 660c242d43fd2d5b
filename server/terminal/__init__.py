"""A chat in the terminal, with any server of the OpenAI API."""
