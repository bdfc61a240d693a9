"""Fine-tune Llama 3 in plain PyTorch on FSDP2."""

from minillama.distributed import shard
from minillama.generate import generate
from minillama.hf import from_pretrained, load_adapter, load_weights, save_adapter
from minillama.lora import LoraConfig, apply_lora, merge_lora
from minillama.model import Llama, LlamaConfig
from minillama.surgery import replace_modules
from minillama.tokenizer import load_tokenizer
from minillama.train import train_step

__all__ = [
    "Llama",
    "LlamaConfig",
    "LoraConfig",
    "apply_lora",
    "from_pretrained",
    "generate",
    "load_adapter",
    "load_tokenizer",
    "load_weights",
    "merge_lora",
    "replace_modules",
    "save_adapter",
    "shard",
    "train_step",
]
