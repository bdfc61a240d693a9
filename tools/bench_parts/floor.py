"""The floor of our step, as a contender of tools/bench.py: its matrix products and attention alone."""

import contextlib
import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from work import Job, Work, compute_dtype, make_model

from minillama.adapters.lora import LoraLinear
from minillama.errors import UserError
from minillama.model.llama import Llama


class Floor:
    """The matrix products and attention calls that our step needs, and nothing else.

    Products: forward; the gradient of an input that has one; the gradient of a weight that trains. The head: rows with
    a label. Attention: SDPA within each document, backward too from the first layer that trains on. Operands of one
    shape are made once and results written in place, so no time is spent on allocation.
    """

    def __init__(self, job: Job, stack: contextlib.ExitStack) -> None:
        if job["method"] == "llama-adapter":
            raise UserError("--floor knows lora and full")
        self.job, self.device, self.dtype = job, job["device"], compute_dtype(job)
        self.model = make_model(job)
        self.operands: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def step(self, work: Work) -> dict[str, float]:
        """Seconds of each part."""
        products = list(floor_products(self.model, work.tokens.numel(), work.trained))
        heads = self.documents(work)
        # The head's differ from step to step: those of the step before are let go.
        self.operands = {shape: operands for shape, operands in self.operands.items() if shape in products}
        for n, k, m in set(products) - self.operands.keys():
            shapes = ((n, k), (k, m), (n, m))
            a, b, out = (torch.randn(shape, device=self.device, dtype=self.dtype) for shape in shapes)
            self.operands[n, k, m] = a, b, out
        began = self.now()
        for product in products:
            a, b, out = self.operands[product]
            torch.mm(a, b, out=out)
        middle = self.now()
        for trains in floor_layers(self.model):
            for q, k, v, gradient in heads:
                with torch.set_grad_enabled(trains):
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
                if trains:
                    torch.autograd.grad(out, (q, k, v), gradient)
        return {"matmuls": middle - began, "attention": self.now() - middle}

    def documents(self, work: Work) -> list[tuple[Tensor, ...]]:
        """Queries, keys, values and the result's gradient of each document, laid out as the projections leave them."""
        config = self.model.config
        H, K, D = config.num_attention_heads, config.num_key_value_heads or 0, config.head_dim or 0
        found = []
        for length in (length for row in work.lengths for length in row):
            made = (torch.randn(1, length, n, D, device=self.device, dtype=self.dtype) for n in (H, K, K, H))
            q, k, v, gradient = (tensor.transpose(1, 2) for tensor in made)
            found.append((q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), gradient))
        return found

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def floor_layers(model: Llama) -> list[bool]:
    """Of each layer, whether its attention has a backward."""
    flows, found = model.model.embed_tokens.weight.requires_grad, []
    for block in model.model.layers:
        flows = flows or trains(block.self_attn) or trains(block.input_layernorm)
        found.append(flows)
        flows = flows or trains(block)
    return found


def floor_products(model: Llama, tokens: int, trained: int) -> Iterable[tuple[int, int, int]]:
    """(n, k, m) of each product (n, k) x (k, m) of a step."""

    def linear(layer: nn.Module, rows: int, input_has_gradient: bool) -> Iterable[tuple[int, int, int]]:
        out_features, in_features = layer.weight.shape  # type: ignore[misc]
        yield rows, in_features, out_features
        if isinstance(layer, LoraLinear):
            yield from linear(layer.lora_A, rows, input_has_gradient)
            yield from linear(layer.lora_B, rows, True)
        if input_has_gradient:
            yield rows, out_features, in_features
        if layer.weight.requires_grad:  # type: ignore[union-attr]
            yield out_features, rows, in_features

    flows = model.model.embed_tokens.weight.requires_grad
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        flows = flows or trains(block.input_layernorm)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            yield from linear(layer, tokens, flows)
        flows = flows or any(trains(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        yield from linear(attention.o_proj, tokens, flows)
        flows = flows or trains(attention.o_proj) or trains(block.post_attention_layernorm)
        yield from linear(mlp.gate_proj, tokens, flows)
        yield from linear(mlp.up_proj, tokens, flows)
        flows = flows or trains(mlp.gate_proj) or trains(mlp.up_proj)
        yield from linear(mlp.down_proj, tokens, flows)
        flows = flows or trains(mlp.down_proj)
    yield from linear(model.lm_head, trained, True)


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
