"""What is measured: shapes of kernels, schemas, traffic and faults, simulated engines."""
