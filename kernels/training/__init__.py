"""What training a draft head computes on a GPU: attention over unrolled entries, and losses."""
