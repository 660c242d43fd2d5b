"""Commands on draft heads: training and evaluation with the engine."""
