"""Runs: the stages of an experiment, their fingerprints, and the execution of one."""
