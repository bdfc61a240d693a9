"""What this machine computes fast: precision, kernels, measured rates."""
