"""Objectives: from a window of text to inputs, targets and the positions that count in the loss."""
