"""Benchmarks: ask, score, report."""
