"""Statistics: paired differences, effects, multiple comparisons, power, and scaling laws."""
