"""The model: plain PyTorch, and the kernels behind it. Imports torch alone."""

from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama

__all__ = ["Llama", "LlamaConfig"]
