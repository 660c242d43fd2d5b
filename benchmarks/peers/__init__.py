"""What Aerie is compared with."""
