"""estimate.py against steps that are made: what they hold, counted by the same mode on real tensors."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_ranks, run_script

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.model.attention import BACKENDS
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.parallel.initialise import materialise
from minillama.parallel.sharding import FsdpConfig, local, make_mesh, set_dtypes, shard
from minillama.training.advise import between
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
    "lora": FsdpConfig(strategy="shard-grad-op", precision="mixed", recompute="selective"),
    "llama-adapter": FsdpConfig(strategy="no-shard", precision="mixed", recompute="full"),
}


def build(method: str) -> Llama:
    with torch.device("meta"):
        model = Llama(STORIES)
    if method == "lora":
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
        batches = [batch_of_zeros(ROWS, LENGTH) for _ in range(2)]
        for batch in batches:
            assert len(batch.lengths) == ROWS and batch.targets.rows.numel() == batch.trained
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
            for batch in batches:
                alive.hold([batch.tokens, batch.positions, batch.targets.rows, batch.targets.ids], "activations")
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
        for phase in ("load", "forward", "backward", "optimizer"):
            assert estimated[phase] == pytest.approx(peaks[phase], rel=0.001), (method, phase)
        assert found.reads == 0


def on_gpus(world_size: int, fsdp: FsdpConfig, layers: int = 5, rows: int = 1, method: str = "full", **changes):
    def built() -> Llama:
        with torch.device("meta"):
            model = Llama(replace(STORIES, num_hidden_layers=layers))
        return apply_lora(model.requires_grad_(False), LoraConfig()) if method == "lora" else model

    settings = {"optim": OptimConfig(), "batch_size": rows, "context_length": 256} | changes
    return estimate(built, world_size, fsdp=fsdp, **settings)


def test_any_number_of_processes():
    parameters = sum(p.numel() for p in build("full").parameters())
    seen = set()
    for world_size in (8, 16384):
        found = on_gpus(world_size, FsdpConfig(strategy="full-shard", precision="mixed"))
        share = 4 * parameters / world_size
        # AdamW's two moments; a rank has no less than one row of a matrix
        assert share <= found.state["parameters"] == found.state["gradients"] <= share + 4 * 172 * 64
        assert found.checkpoint == 12 * parameters + 4 * len({*build("full").parameters()})
        seen.add(found.tokens // world_size)
    assert seen == {256}
    hybrid = on_gpus(16384, FsdpConfig(strategy="hybrid-shard", precision="mixed"))
    assert hybrid.fsdp.shard_size == 8 and {link for _, link in hybrid.work.sent} == {"inside", "between"}
    kinds = {kind for kind, link in hybrid.work.sent if link == "between"}
    assert kinds == {"all-reduce"}


def test_what_is_sent():
    """Full fine-tuning gathers every block in the forward and again in the backward, the ends once, and sums all once."""
    found = on_gpus(8, FsdpConfig(strategy="full-shard", precision="mixed"))
    model = build("full")
    ends = model.lm_head.weight.numel() + model.model.norm.weight.numel()
    blocks = sum(p.numel() for p in model.parameters()) - ends
    padded = 1.05  # 172 rows are 8 times 22, not 21.5
    gathered = 2 * (2 * blocks + ends) * 7 / 8  # bf16
    assert gathered <= found.work.sent["all-gather", "inside"] <= padded * gathered
    summed = 4 * (blocks + ends) * 7 / 8  # fp32
    assert summed <= found.work.sent["reduce-scatter", "inside"] <= padded * summed


def test_fewer_layers_and_rows_tell_of_more():
    for method, recompute, offload in (("lora", "selective", False), ("full", "full", True)):
        fsdp = FsdpConfig(strategy="full-shard", precision="mixed", recompute=recompute, cpu_offload=offload)
        corners = {(d, b): on_gpus(8, fsdp, layers=d, rows=b, method=method) for d in (2, 3) for b in (1, 2)}
        guess, found = between(corners, 7, 4), on_gpus(8, fsdp, layers=7, rows=4, method=method)
        assert guess.peak == pytest.approx(found.peak, rel=0.03), method
        assert guess.work.flops == pytest.approx(found.work.flops, rel=1e-6)
        assert guess.state == found.state and guess.tokens == found.tokens
    assert found.host > found.state["optimizer"] > 0  # offloaded
    assert not {"parameters", "optimizer", "gradients"} & found.peaks["optimizer"].kinds.keys()


def test_recomputation_is_in_the_flops_and_not_in_those_needed():
    none, full = (
        on_gpus(1, FsdpConfig(strategy="full-shard", precision="mixed", recompute=r)) for r in ("none", "full")
    )
    assert none.needed == full.needed
    # attention's backward computes the scores again: 7 products where 6 are needed
    assert none.needed < none.work.flops < 1.05 * none.needed
    assert 1.2 < full.work.flops / none.work.flops < 4 / 3
    assert full.peaks["forward"].kinds["activations"] < none.peaks["forward"].kinds["activations"] / 4


@pytest.mark.parametrize("recipe", ["full_fsdp", "lora_fsdp", "llama_adapter_fsdp"])
def test_a_recipe_says_what_it_would_need(recipe, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))  # no weights, no tokenizer, no data
    script = Path(__file__).parents[1] / "recipes" / f"{recipe}.py"
    flags = ("--model", tmp_path, "--output-dir", tmp_path / "out", "--estimate", 64, "--data.context-length", 128)
    codes, text = run_script(script, *flags, log=tmp_path / "log")
    assert codes == [0], text
    assert text.startswith("processes   64, ") and re.search(r"^h100-80 +fits", text, re.M), text
    assert not (tmp_path / "out").exists()


def test_the_tool(tmp_path):
    script = Path(__file__).parents[1] / "tools" / "estimate.py"
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    flags = ("--model", tmp_path / "config.json", "--method", "full", "--gpu", "rtx4090-24", "--advise")
    codes, text = run_script(script, *flags, "--context-length", 64, log=tmp_path / "log")
    assert codes == [0], text
    rates = [int(line.split()[0].replace(",", "")) for line in text.splitlines() if " --fsdp.strategy " in line[:40]]
    assert len(rates) == 6 and rates == sorted(rates, reverse=True)
    assert "the fewest rtx4090-24 that hold a step: 1" in text
    assert re.search(
        r"^command     python recipes/full_fsdp.py --model \S+ --output-dir out --fsdp.strategy ", text, re.M
    )
