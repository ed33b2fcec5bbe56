"""Kernel providers, one file or folder each, found by scanning: see `cobra.ops.dispatch` for what one must define."""
