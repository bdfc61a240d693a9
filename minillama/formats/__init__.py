"""Checkpoints of Hugging Face and Meta, in and out."""
