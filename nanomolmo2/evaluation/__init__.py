"""Evaluation: exams of any benchmark, scorers, intervals, reports."""
