"""Data sets on disk: download, extract, convert, check."""
