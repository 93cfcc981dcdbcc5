"""Data: sources -> documents -> corpus -> batches."""
