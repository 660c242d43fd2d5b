"""Messages between the HTTP process and the engine process, and the client that sends them."""
