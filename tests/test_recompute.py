"""Which matrix products --fsdp.recompute selective keeps: by their size, whatever adapters add."""

from functools import partial

import pytest
import torch
from conftest import random_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.model.quant import apply_quantization
from minillama.parallel.recompute import keep_some

ADAPTERS = {
    "none": lambda model: None,
    "q_proj v_proj": lambda model: apply_lora(model, LoraConfig(rank=4, dropout=0.1)),
    "all-linear": lambda model: apply_lora(model, LoraConfig(rank=4, dropout=0.1, targets=("all-linear",))),
    "llama-adapter": lambda model: apply_llama_adapter(model, LlamaAdapterConfig(prompt_len=5)),
}


class Products(TorchDispatchMode):
    """Counts the products with each weight of the model, as often as they are really computed."""

    def __init__(self, model):
        super().__init__()
        self.names = {(p.data_ptr(), p.t().stride()): n for n, p in model.named_parameters() if p.ndim == 2}
        self.quantized = {p.data_ptr(): n for n, p in model.named_parameters() if p.dtype == torch.uint8}
        self.runs = dict.fromkeys([*self.names.values(), *self.quantized.values()], 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("aten::mm", "aten::addmm"):
            weight = (args[-1].data_ptr(), args[-1].stride())  # as x W^T takes it: in the backward others do
            if weight in self.names:
                self.runs[self.names[weight]] += 1
        if function.name() == "minillama::quantized_linear":
            self.runs[self.quantized[args[1].data_ptr()]] += 1
        return function(*args, **(kwargs or {}))


def products(adapter, selective, bias, quantize):
    """The gradients, and how often each product is computed that a backward of the second block needs."""
    model = random_model(attention_bias=bias).requires_grad_(adapter == "none")
    if quantize:
        apply_quantization(model, "int8")
    ADAPTERS[adapter](model)
    for block in model.model.layers:
        options = {"context_fn": keep_some(block)} if selective else {}
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    torch.manual_seed(0)
    with Products(model.train()) as counted:
        model(torch.arange(40).view(2, 20), labels=torch.arange(40).view(2, 20)).backward()
    runs = {n.removeprefix("model.layers.1."): count for n, count in counted.runs.items() if "layers.1" in n}
    return [p.grad for p in model.parameters() if p.grad is not None], runs


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_same_large_products_are_kept_whatever_adapts_the_block(adapter, bias, quantize):
    if quantize and adapter == "none":
        pytest.skip("a quantised base does not train")
    (gradients, full), (same, selective) = (products(adapter, some, bias, quantize) for some in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    twice = {name for name, runs in full.items() if runs > 1}
    assert len(twice) > 5
    kept = {"self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight"}
    assert kept < twice
    differ = {name for name in full if full[name] != selective[name]}
    assert differ == kept and all(2 * selective[name] == full[name] for name in kept)
