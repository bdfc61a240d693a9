"""Fine-tune Llama 3 in plain PyTorch on FSDP2."""
