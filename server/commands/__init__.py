"""The sub-commands of `aerie`."""
