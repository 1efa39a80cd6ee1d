"""Training: recipes, a resumable loop, optimisers, ranks, checkpoints."""
