"""Semantic parts and keypoints of 3D shapes, by convolutions in the spectra of their graphs."""
