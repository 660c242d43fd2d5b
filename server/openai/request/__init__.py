"""What clients send: the fields of requests, checked."""
