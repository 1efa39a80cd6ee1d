"""Emoji scenes with exact ground truth: the world that the bundled model `tiny` lives in."""
