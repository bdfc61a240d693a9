"""LoRA and llama-adapter, in PEFT's format."""
