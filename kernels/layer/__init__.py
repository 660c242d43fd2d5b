"""A whole decoder layer as one call, where a backend has it."""
