"""The C++ CPU backend: build, load, thread pool."""
