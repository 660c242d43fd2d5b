"""Where the nodes of a step lie among its packed tokens."""
