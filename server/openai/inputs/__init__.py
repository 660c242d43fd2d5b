"""A checked request as what the engine needs: token ids, sampling parameters, a grammar."""
