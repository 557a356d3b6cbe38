"""Studies: a YAML file becomes arms, the arms a plan, the plan runs, the runs a comparison."""
