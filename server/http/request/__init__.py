"""What a client sent: bodies and queries, decoded and checked."""
