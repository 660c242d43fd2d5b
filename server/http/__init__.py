"""The HTTP application, independent of the API that it serves."""
