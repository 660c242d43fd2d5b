"""Makes quantised checkpoints: rounds the weights of a model so that its outputs change little."""
