"""Tables: of a plan, of the state of runs, of a comparison; for the terminal, Markdown, CSV and LaTeX."""
