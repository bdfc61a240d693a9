"""Full fine-tuning, LoRA and llama-adapter train alike under every strategy, split and saving of memory; adapters also on a
quantised base, which trains as what it dequantises to.

The suite runs a choice in which any two settings meet; `pytest tests/test_matrix.py --whole-matrix -s` runs every
combination, and prints the largest differences from one process with a plain, unsharded model.
"""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import random_model, run_ranks, save_folder
from test_packing import documents_of

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.data.batch import collate
from minillama.data.packing import pack
from minillama.formats.hf import check_weights, load_weights, open_weights, read_config
from minillama.formats.hf_export import write_model
from minillama.formats.quantized import QuantizingWeights, quantize_base
from minillama.model.llama import Llama
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.sharding import FsdpConfig, choose_strategy, make_mesh, set_dtypes, shard
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.plan import TrainConfig, steps
from minillama.training.step import train_step

KINDS = {"full": 1e-3, "lora": 3e-3, "dora": 3e-3, "ends": 3e-3, "adapter": 1e-1, "nf4": 3e-3, "int8": 3e-3}
"""With the learning rate of each. nf4: LoRA on a base so quantised. int8: DoRA on one."""
QUANTIZED = ("nf4", "int8")
STRATEGIES = {"full-shard": 0, "shard-grad-op": 0, "no-shard": 0, "hybrid-shard": 2, "auto": 0}
"""With the shard size of each."""
WINDOW = 8
"""Packs that a step takes, however they are split."""
STEPS = 3


def build(kind, folder, quantize=""):
    with torch.device("meta"):
        model = Llama(read_config(folder)).requires_grad_(kind == "full")
    if quantize:
        quantize_base(model, check_weights(model, folder), kind)
    targets = ("embed_tokens", "v_proj", "lm_head") if kind == "ends" else ("q_proj", "v_proj", "down_proj")
    if kind in ("lora", "dora", "ends", *QUANTIZED):
        apply_lora(model, LoraConfig(rank=4, dropout=0.0, targets=targets, dora=kind in ("dora", "int8")))
    if kind == "adapter":
        apply_llama_adapter(model, LlamaAdapterConfig(prompt_len=5, layers=2))
    return model


def train(kind, folder, accumulate=1, fsdp=None):
    """(loss, gradient norm) of each step; fsdp None: on a plain model, of which no weight is quantised."""
    model = build(kind, folder, quantize=fsdp is not None and kind in QUANTIZED)
    set_dtypes(model, fsdp or FsdpConfig(precision="fp32"))
    if fsdp:
        fsdp = choose_strategy(model, fsdp, "cpu")
        shard(model, make_mesh(fsdp, "cpu"), fsdp)
    materialise(model, "cpu")
    initialise(model, 3, loaded=load_weights(model, folder))
    optimizer = make_optimizer(model.parameters(), OptimConfig(lr=KINDS[kind]))
    # one document a pack, and 6 instead of 8 packs in every second step: some ranks have less to do, or nothing
    packed = pack(documents_of(np.random.default_rng(0).integers(11, 20, 14).tolist()), 20, 0)
    assert len(packed) == 14
    world_size = dist.get_world_size()
    config = TrainConfig(
        epochs=STEPS, max_steps=STEPS, batch_size=WINDOW // world_size // accumulate, accumulate=accumulate
    )
    numbers = []
    for step in steps(packed, config, 0, dist.get_rank(), world_size, config.begin(world_size)):
        batches = [collate(packed, packs, 0, "cpu") for packs in step.micro_batches]
        loss, norm = train_step(model, optimizer, batches, clip_norm=1.0)
        numbers.append((loss.item(), norm.item()))
    return numbers


def train_all(mesh, cases):
    return [train(kind, folder, accumulate, fsdp) for kind, folder, accumulate, fsdp in cases]


# (world size, kind, strategy, accumulate, recompute, offload)
WHOLE_MATRIX = [
    case
    for case in itertools.product((1, 2, 4), KINDS, STRATEGIES, (1, 2), ("none", "full", "selective"), (False, True))
    if case[0] >= STRATEGIES[case[2]]
]


def pairwise():
    """Some cases of the whole matrix, of which each pair of two settings' values has one."""

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    cases = WHOLE_MATRIX.copy()
    random.Random(21).shuffle(cases)  # 25 cases; most seeds make 26 or 27
    left = set().union(*map(pairs, cases))
    while left:
        case = max(cases, key=lambda case: len(pairs(case) & left))
        left -= pairs(case)
        yield case


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """The base of each kind; NF4 needs rows of 64 weights."""
    wide = {"hidden_size": 64, "intermediate_size": 128}
    wide_folder = save_folder(random_model(**wide), tmp_path_factory.mktemp("wide"), **wide)
    return {kind: wide_folder if kind in QUANTIZED else tiny_folder for kind in KINDS}


@pytest.fixture(scope="module")
def plain(folders, tmp_path_factory):
    bases = dict(folders)
    for kind in QUANTIZED:  # quantised and dequantised beforehand
        bases[kind] = tmp_path_factory.mktemp(kind) / "base"
        weights, config = open_weights(folders[kind]), read_config(folders[kind])
        write_model(QuantizingWeights(weights, kind), config, bases[kind], folders[kind])
    cases = [(kind, bases[kind], 1, None) for kind in KINDS]
    return dict(zip(KINDS, run_ranks(train_all, 1, cases)[0], strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_same_losses_and_norms(plain, folders, world_size, request):
    names, cases = [], []
    for ranks, kind, strategy, accumulate, recompute, offload in (
        WHOLE_MATRIX if request.config.getoption("--whole-matrix") else pairwise()
    ):
        if ranks != world_size:
            continue
        fsdp = FsdpConfig(
            strategy=strategy,
            shard_size=STRATEGIES[strategy],
            precision="fp32",
            recompute=recompute,
            cpu_offload=offload,
        )
        names.append((kind, strategy, accumulate, recompute, offload))
        cases.append((kind, folders[kind], accumulate, fsdp))
    runs = []
    for start in range(0, len(cases), 24):
        results = run_ranks(train_all, world_size, cases[start : start + 24])
        assert all(other == results[0] for other in results), "ranks report different numbers"
        runs += results[0]
    worst = {}
    for name, numbers in zip(names, runs, strict=True):
        assert len(numbers) == STEPS
        differences = np.abs(np.array(numbers) / np.array(plain[name[0]]) - 1).max(axis=0)
        worst.setdefault(name[:2], []).append(differences)
        assert differences.max() < 1e-4, (name, differences, numbers)
        assert differences[0] < 1e-5, (name, differences)
        losses = np.array(numbers)[:, 0]
        assert losses[-1] < losses[0] - 0.1, f"{name} learns nothing: {losses}"
    for (kind, strategy), differences in worst.items():
        loss, norm = np.max(differences, axis=0)
        print(f"{world_size} ranks {kind:8} {strategy:14} {len(differences):3} runs: loss {loss:.1e}, norm {norm:.1e}")
