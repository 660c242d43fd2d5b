"""Continuous-batching engine: requests in, tokens out."""
