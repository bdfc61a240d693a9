"""Fine-tune Llama 3 in plain PyTorch on FSDP2."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora, merge_lora
from minillama.inference.generate import generate
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.model.surgery import replace_modules
from minillama.parallel.sharding import shard

if TYPE_CHECKING:
    from minillama.adapters.peft import load_adapter, save_adapter
    from minillama.formats.hf import from_pretrained, load_weights
    from minillama.formats.hf_export import save_pretrained
    from minillama.formats.hub import find_model
    from minillama.hardware.precision import fast_dtype
    from minillama.tokenizer.tokenizer import load_tokenizer
    from minillama.training.step import train_step

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
    "adapters.peft": ("load_adapter", "save_adapter"),
    "formats.hf": ("from_pretrained", "load_weights"),
    "formats.hf_export": ("save_pretrained",),
    "formats.hub": ("find_model",),
    "hardware.precision": ("fast_dtype",),
    "tokenizer.tokenizer": ("load_tokenizer",),
    "training.step": ("train_step",),
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(f"minillama.{module}"), name)
    raise AttributeError(f"module 'minillama' has no attribute {name!r}")
