"""Texts, grammars and templates for tests."""
