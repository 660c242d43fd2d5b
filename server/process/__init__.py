"""The processes of a server and how they talk."""
