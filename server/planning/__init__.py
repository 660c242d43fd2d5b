"""Predicts memory and time per token of a deployment. Pure arithmetic: no torch, no GPU."""
