"""Ground: strict sections, YAML that knows its lines, overrides, differences, fingerprints. Knows no section."""
