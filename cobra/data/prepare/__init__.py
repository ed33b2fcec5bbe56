"""Data sets and benchmarks: fetched, unpacked, converted, checked."""
