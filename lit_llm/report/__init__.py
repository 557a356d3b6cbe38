"""Faces: what people see of a plan, of runs in progress, and of a comparison."""
