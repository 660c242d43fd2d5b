"""Which of several engines computes a request."""
