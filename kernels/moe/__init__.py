"""Feed-forward blocks of which each token uses one."""
