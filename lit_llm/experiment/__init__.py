"""One run: the experiment's schema, its presets, its identity, its cost, and the execution of a stage."""
