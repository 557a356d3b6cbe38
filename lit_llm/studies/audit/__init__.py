"""Audit: whether the arms of a study may be compared, and which of them compute the same."""
