"""Whether the server has time for a request, and the threads that work on it."""
