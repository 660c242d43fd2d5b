"""Draft models: EAGLE-1/2, multi-layer dense EAGLE, EAGLE-3."""
