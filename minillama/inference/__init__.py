"""Sampling, and evaluation by lm-eval."""
