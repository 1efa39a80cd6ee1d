"""Benchmarks that others published, from their own files: see docs/benchmarks.md."""

from nanomolmo2.evaluation.public.benchmark import PublicBenchmark, PublicSource
from nanomolmo2.evaluation.public.table import PUBLIC

__all__ = ["PUBLIC", "PublicBenchmark", "PublicSource"]
