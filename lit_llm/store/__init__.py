"""Store: results on disk, which are the truth; locks, and garbage collection. Knows no experiment."""
