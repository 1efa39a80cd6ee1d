"""Scenes of things to be found by example: the world that pointing at "more like this" learns from.

Below, `data/registry.py` knows it by name only.

    drawings, procedural, looks       the kinds of things      grounds, camera   what is around them
    settings, kinds, table, scenes    pictures and their truth
    questions, wordings               what is asked            source, write     as training data
"""
