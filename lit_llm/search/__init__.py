"""Studies: a sweep file -> Optuna -> runs; the same search for every arm, and a study of what won."""
