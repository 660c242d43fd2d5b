"""What every request passes before its route: the log, guards, keys, limits of bodies."""
