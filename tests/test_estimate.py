"""estimate.py against steps that are made: what they hold, counted by the same mode on real tensors."""

import pytest
import torch
from conftest import run_ranks

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.model.attention import BACKENDS
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.parallel.initialise import materialise
from minillama.parallel.sharding import FsdpConfig, local, make_mesh, set_dtypes, shard
from minillama.training.alive import Alive
from minillama.training.estimate import batch_of_zeros, estimate
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.step import train_step

STORIES = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=True,
)
"""stories260K's"""
ROWS, LENGTH = 2, 64
CASES = {
    "full": FsdpConfig(strategy="full-shard", precision="fp32"),
    "full recompute": FsdpConfig(strategy="full-shard", precision="mixed", recompute="full"),
    "lora": FsdpConfig(strategy="shard-grad-op", precision="mixed", recompute="selective"),
    "lora replicated": FsdpConfig(strategy="no-shard", precision="mixed"),
    "llama-adapter": FsdpConfig(strategy="full-shard", precision="fp32"),
}


def build(method: str) -> Llama:
    with torch.device("meta"):
        model = Llama(STORIES)
    if method.startswith("lora"):
        apply_lora(model.requires_grad_(False), LoraConfig())
    if method == "llama-adapter":
        apply_llama_adapter(model.requires_grad_(False), LlamaAdapterConfig(layers=3))
    return model


def size(tensors) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors)


def real_steps(_) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Of each case: what this rank holds between backward and step, and the peak of each phase."""
    found = []
    for method, fsdp in CASES.items():
        model = build(method)
        model.attention = BACKENDS["math"]
        set_dtypes(model, fsdp)
        shard(model, make_mesh(fsdp, "cpu"), fsdp)
        alive = Alive()
        state = {}
        with alive:
            materialise(model, "cpu")
            alive.hold(model.parameters(), "parameters")
            for parameter in model.parameters():
                torch.nn.init.normal_(local(parameter.detach()), std=0.1)
            optimizer = make_optimizer(model.parameters(), OptimConfig())
            states = [t for s in optimizer.state.values() for t in s.values()]
            alive.hold(states, "optimizer")
            alive.watch(model, optimizer)

            def note(*_, model=model, state=state, states=states) -> None:
                state["parameters"] = size(model.parameters())
                state["gradients"] = size(p.grad for p in model.parameters() if p.grad is not None)
                state["optimizer"] = size(states)

            optimizer.register_step_pre_hook(note)
            batches = [batch_of_zeros(ROWS, LENGTH) for _ in range(2)]
            model.train()
            loss, _norm = train_step(model, optimizer, batches)
        assert loss.isfinite()
        found.append((state, {phase: peak.size for phase, peak in alive.peaks().items()}))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_estimate_is_what_a_step_holds(world_size):
    real = run_ranks(real_steps, world_size)[0]
    for (method, fsdp), (state, peaks) in zip(CASES.items(), real, strict=True):
        found = estimate(
            lambda method=method: build(method),
            world_size,
            fsdp=fsdp,
            optim=OptimConfig(),
            batch_size=ROWS,
            context_length=LENGTH,
            accumulate=2,
            device="cpu",
            attention="math",
        )
        assert found.state == state, method
        estimated = {phase: peak.size for phase, peak in found.peaks.items()}
        print(method, world_size, peaks, estimated)
        for phase in ("load", "forward", "backward", "optimizer"):
            assert estimated[phase] == pytest.approx(peaks[phase], rel=0.05), (method, phase)
        assert found.reads == 0
