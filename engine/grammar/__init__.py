"""Grammars that the text of a request must match: compiled, and followed token by token."""
