"""Report: plans, runs in progress and comparisons as tables, pages and figures."""
