"""Sweeps: a sweep file becomes an Optuna search, the same for every arm, and a confirmation study of the winners."""
