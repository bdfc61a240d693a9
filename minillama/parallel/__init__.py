"""Processes, sharding and memory: a model on several ranks."""
