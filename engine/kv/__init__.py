"""Key/value cache: block bookkeeping (pure Python) and tensor storage."""
