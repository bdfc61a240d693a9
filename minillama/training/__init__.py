"""A run: the step, optimizer, metrics, checkpoints, profiling."""
