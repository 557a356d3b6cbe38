"""Design of a study: factors, levels, and the points that are run."""
