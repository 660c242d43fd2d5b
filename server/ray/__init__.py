"""Several engines with Ray Serve, which places, restarts, scales and counts them."""
