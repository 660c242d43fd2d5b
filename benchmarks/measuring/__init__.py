"""What measurements share: the machine, clocks, bars and pictures."""
