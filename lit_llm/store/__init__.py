"""Store: results on disk, the source of truth; locks and garbage collection. Knows no experiment."""
