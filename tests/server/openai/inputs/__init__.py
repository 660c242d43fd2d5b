"""Tests of server/openai/inputs."""
