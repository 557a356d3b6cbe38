"""Pages: the HTML report of a study, of a sweep, of two studies, and of a whole store."""
