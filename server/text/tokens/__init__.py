"""Tokenizers: text to token ids, ids to text, and the files that they are read from."""
