"""Configuration basics: strict sections, YAML with lines, overrides, differences, fingerprints. Knows no section."""
