"""Data: corpora, tokenizers, tokenised files, and batches that depend on (seed, step) only."""
