"""The HTTP application, whichever API it serves."""
