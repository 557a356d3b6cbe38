"""Ground: results on disk (the truth), locks, and MLflow (the mirror). Knows no experiment."""
