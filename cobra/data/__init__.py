"""Annotations and images -> batches."""
