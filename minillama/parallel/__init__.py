"""Processes, sharding and memory: a model spread over ranks."""
