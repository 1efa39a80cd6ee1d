"""Training and test examples: pictures with trees of messages."""
