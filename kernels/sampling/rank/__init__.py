"""Which tokens a draft head guesses: scores with the noise of the draw to come."""
