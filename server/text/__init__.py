"""Tokenizer, chat template, incremental detokenisation."""
