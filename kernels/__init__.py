"""One folder per operation: reference, native CPU kernel, Triton kernel."""
