"""Scaling: power laws of the loss, isoFLOP profiles, and the gate of a scaling ladder."""
