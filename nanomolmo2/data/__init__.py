"""Training and test examples: images with trees of messages."""
