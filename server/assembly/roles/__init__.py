"""Engines that compute prompts and engines that decode: how one is joined to the others."""
