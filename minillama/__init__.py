"""Fine-tune Llama 3 in plain PyTorch on FSDP2."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minillama.distributed import shard
from minillama.generate import generate
from minillama.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.lora import LoraConfig, apply_lora, merge_lora
from minillama.model import Llama, LlamaConfig
from minillama.surgery import replace_modules

if TYPE_CHECKING:
    from minillama.adapters import load_adapter, save_adapter
    from minillama.hf import from_pretrained, load_weights, save_pretrained
    from minillama.hub import find_model
    from minillama.precision import fast_dtype
    from minillama.tokenizer import load_tokenizer
    from minillama.train import train_step

__all__ = [
    "Llama",
    "LlamaAdapterConfig",
    "LlamaConfig",
    "LoraConfig",
    "apply_llama_adapter",
    "apply_lora",
    "fast_dtype",
    "find_model",
    "from_pretrained",
    "generate",
    "load_adapter",
    "load_tokenizer",
    "load_weights",
    "merge_lora",
    "replace_modules",
    "save_adapter",
    "save_pretrained",
    "shard",
    "train_step",
]

# What needs more than torch is imported when it is asked for: `import minillama.model` needs torch alone.
_LATER = {
    "adapters": ("load_adapter", "save_adapter"),
    "hf": ("from_pretrained", "load_weights", "save_pretrained"),
    "hub": ("find_model",),
    "precision": ("fast_dtype",),
    "tokenizer": ("load_tokenizer",),
    "train": ("train_step",),
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(f"minillama.{module}"), name)
    raise AttributeError(f"module 'minillama' has no attribute {name!r}")
