"""Learning: what a model is worth, measured the same way for every family."""
