"""Draft trees: their type, verification, and the proposer contract."""
