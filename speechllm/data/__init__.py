"""Corpora, the data schema, batches and caches."""
