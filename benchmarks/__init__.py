"""Benchmarks: `make bench`, or `python -m benchmarks --help`. They need a checkout and `.[dev]`."""
