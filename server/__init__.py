"""HTTP front end, engine process, command line."""
