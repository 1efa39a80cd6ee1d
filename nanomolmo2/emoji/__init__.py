"""Emoji scenes with exact ground truth: the world that the bundled model `tiny` lives in.

The packages below know it by name only: `data/registry.py`, `recipes`, `evaluation/exam.py`.

    scenes, pairs, clips, questions   what is drawn and asked       source, write   as training data
    model, heads, plans, *_stage(s)   how `tiny` learns             train           all its stages
    exam, scorers, benchmark          how well a model answers
"""
