"""Tracking: MLflow, kept in step with what the store has on disk."""
