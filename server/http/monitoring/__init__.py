"""What operators see: metrics, traces, how a head learns."""
