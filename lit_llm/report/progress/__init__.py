"""Progress: a live table in a terminal, plain lines elsewhere, and JSON lines for programs."""
