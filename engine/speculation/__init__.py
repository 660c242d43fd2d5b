"""Speculation: which rows draft, and how much; the walk down a tree; the interface of heads."""
