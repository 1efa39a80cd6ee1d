"""Evaluation: scorers, and the fixed emoji test sets."""
