"""The training journey."""
