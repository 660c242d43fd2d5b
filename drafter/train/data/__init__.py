"""What a head learns from: conversations as token ids, batches, and the target's features."""
