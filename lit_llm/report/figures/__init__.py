"""Figures of a study: each a function from plain data to a figure, all in one style."""
