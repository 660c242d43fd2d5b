"""Draft trees for tests, and proposers that know the texts."""
