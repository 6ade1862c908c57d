"""Training: one loop, the recipes that run in it, and the state a run is resumed from."""
