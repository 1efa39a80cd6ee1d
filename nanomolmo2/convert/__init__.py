"""Checkpoints: reference formats in, our own format in and out, and the Hugging Face hub."""
