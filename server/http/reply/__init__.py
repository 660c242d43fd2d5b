"""Replies: streams and whole ones, those made in the background, and those kept for later."""
