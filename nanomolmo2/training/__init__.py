"""Training: a resumable loop, optimisers, and the recipe of the bundled ``tiny`` model."""
