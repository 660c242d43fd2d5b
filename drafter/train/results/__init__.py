"""What comes of training: measurements, charts, and the published folder with its model card."""
