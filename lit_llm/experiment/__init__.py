"""Experiment: the schema of one full configuration, its presets, its cost. Loads no torch."""
