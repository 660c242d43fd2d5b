"""The draft head learns from live requests: a process trains it, and the server swaps it."""
