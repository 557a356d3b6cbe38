"""Learning: one LightningModule for every family, optimisers, schedules, callbacks, exact resume."""
