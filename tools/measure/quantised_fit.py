"""Which Llama 3 trains with LoRA on which cards, on a base that is quantised or not: from counted bytes, without a GPU.

    python tools/measure/quantised_fit.py
    python tools/measure/quantised_fit.py --context-length 4096 --cards 1x16 1x24

Counts, in bf16, LoRA of rank 8 on all linear layers, one row a process, --fsdp.recompute full, --fsdp.strategy full-shard:
the tensors that a process holds of the base, the adapters with gradients and Adam's moments; what it gathers, two blocks and
the ends; the weights and temporaries of the largest product; each block's input; what autograd keeps of one block that is
run again, on the meta device; two times the gradient of the widest tensor; the loss's logits. What CUDA, its libraries and
the allocator take is not counted: a model fits if a twelfth of the card is left.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

from dataclasses import replace

import torch
import tyro
from torch import nn

from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.errors import UserError
from minillama.help import filled
from minillama.model.attention import BACKENDS
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.model.loss import CHUNK_BYTES
from minillama.model.quant import apply_quantization, quantized_layers
from minillama.model.rope import rope_table
from minillama.parallel.failures import user_errors

GROUP = 8
# hidden, MLP, layers, heads, tied
LLAMAS = {
    "1B": (2048, 8192, 16, 32, True),
    "3B": (3072, 8192, 28, 24, True),
    "8B": (4096, 14336, 32, 32, False),
    "70B": (8192, 28672, 80, 64, False),
    "405B": (16384, 53248, 126, 128, False),
}


def config_of(name: str) -> LlamaConfig:
    hidden, mlp, layers, heads, tied = LLAMAS[name]
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return LlamaConfig(128256, **sizes, num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=tied)


def size(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()) if not t.requires_grad)


def needed(config: LlamaConfig, kind: str, tokens: int, processes: int) -> float:
    """Bytes that a process needs at its peak."""
    with torch.device("meta"):
        model = Llama(replace(config, num_hidden_layers=1)).to(torch.bfloat16).requires_grad_(False)
        if kind != "none":
            apply_quantization(model, kind)  # type: ignore[arg-type]
        apply_lora(model, LoraConfig(rank=8, dropout=0.0, targets=("all-linear",)))
        block, layers, width = model.model.layers[0], config.num_hidden_layers, config.hidden_size
        base, ends = size(block), size(model) - size(block)
        adapters = sum(p.numel() for p in block.parameters() if p.requires_grad)
        held = (layers * base + ends + layers * adapters * 16) / processes
        gathered = 0 if processes == 1 else 2 * (base + 2 * adapters) + ends
        largest = max(layer.out_features * layer.in_features for layer in (block.mlp.up_proj, block.self_attn.q_proj))
        temporary = largest * {"none": 0, "nf4": 2 + 4 + 2, "int8": 4 + 2}[kind]  # bf16, fp32, codes as int32
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter) and tensor.numel() >= tokens:
                kept[id(tensor)] = tensor.numel() * tensor.element_size()
            return tensor

        x = torch.empty(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
        rope = rope_table(config, torch.arange(tokens)[None])
        context = BACKENDS["math"]([tokens], torch.device("cpu"))
        own = {id(tensor) for tensor in block.buffers()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            alive = block(x, rope, context)
    del alive
    block_bytes = sum(nbytes for number, nbytes in kept.items() if number not in own)
    backward = 2 * 2 * tokens * config.intermediate_size
    inputs = layers * tokens * width * 2
    return held + gathered + temporary + inputs + block_bytes + backward + 2 * CHUNK_BYTES["cuda"]


def main(context_length: int = 8192, cards: tuple[str, ...] = ("1x24", "1x48", "1x80", "8x80")) -> None:
    """Print the table.

    Args:
        context_length: tokens in a row.
        cards: how many of how many GB each, as 8x80.
    """
    counts = []
    for card in cards:
        number, _, gigabytes = card.partition("x")
        if not (number.isdecimal() and gigabytes.isdecimal() and int(number) and int(gigabytes)):
            raise UserError(f"--cards {card}: give how many of how many GB each, as 8x80")
        counts.append((int(number), int(gigabytes)))
    print(f"| Llama 3, {context_length} tokens | base | bytes a weight | " + " | ".join(cards) + " |")
    print("|---" * (3 + len(cards)) + "|")
    for name in LLAMAS:
        config = config_of(name)
        for kind in ("none", "int8", "nf4"):
            cells = []
            for number, gigabytes in counts:
                gb = needed(config, kind, context_length, number) / 1e9
                cells.append(f"{'**' * (fits := gb <= gigabytes * 11 / 12)}{gb:.1f} GB{'**' * fits}")
            print(f"| {name} | {kind} | {bytes_a_weight(config, kind):.3f} | " + " | ".join(cells) + " |")


def bytes_a_weight(config: LlamaConfig, kind: str) -> float:
    """Of the blocks' linear layers."""
    if kind == "none":
        return 2.0
    with torch.device("meta"):
        layers = quantized_layers(apply_quantization(Llama(replace(config, num_hidden_layers=1)), kind)).values()  # type: ignore[arg-type]
    return sum(m.nbytes for m in layers) / sum(m.in_features * m.out_features for m in layers)


if __name__ == "__main__":
    with user_errors():
        tyro.cli(filled(main))
