"""Studies: from results to numbers that can be believed."""
