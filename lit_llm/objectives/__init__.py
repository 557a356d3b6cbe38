"""Learning: how a window of text becomes inputs, targets and the positions that count in the loss."""
