"""estimate.py against steps that are made: what they hold, counted by the same mode on real tensors."""

import importlib.util
import json
import re
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_script

from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.errors import UserError
from minillama.formats.bitsandbytes import quantization_config
from minillama.formats.quantized import quantize_base
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.model.quant import quantized_layers
from minillama.parallel.sharding import FsdpConfig
from minillama.training.advise import BATCHES, DEPTHS, Adviser, between
from minillama.training.estimate import estimate
from minillama.training.optim import OptimConfig

TOOLS = Path(__file__).parents[1] / "tools"
STORIES = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=True,
)
"""stories260K's, with fewer layers"""


def build() -> Llama:
    with torch.device("meta"):
        return Llama(STORIES)


BOTH = ("none", "nf4")


@pytest.mark.parametrize(
    "world_size, methods",
    [(1, {"lora": BOTH}), (2, {"llama-adapter": BOTH}), (4, {"full": ("none",), "lora": BOTH, "llama-adapter": BOTH})],
)
def test_an_estimate_is_what_a_step_holds(world_size, methods, tmp_path):
    """Parameters, gradients and optimizer exactly, peaks within 5 %: tools/measure/estimate_check.py fails otherwise."""
    fitting = asdict(STORIES) | {"intermediate_size": 192}  # NF4's blocks are of 64
    (tmp_path / "config.json").write_text(json.dumps(TINY | fitting))
    flags = ("--model", tmp_path, "--context-length", 64, "--methods", *methods)
    check = TOOLS / "measure" / "estimate_check.py"
    codes, text = run_script(check, *flags, world_size=world_size, log=tmp_path / "log")
    assert codes == [0] * world_size, text
    counted = re.findall(r"^(\S+), (\w+), .*backward ([\d.]+) / ([\d.]+)", text, re.M)
    assert [case[:2] for case in counted] == [(method, kind) for method in methods for kind in methods[method]]
    for _, _, estimated, real in counted:
        assert float(estimated) == pytest.approx(float(real), rel=0.001, abs=0.011)


def on_gpus(world_size: int, fsdp: FsdpConfig, layers: int = 2, rows: int = 1, method: str = "full", **changes):
    def built() -> Llama:
        with torch.device("meta"):
            model = Llama(replace(STORIES, num_hidden_layers=layers))
        return apply_lora(model.requires_grad_(False), LoraConfig()) if method == "lora" else model

    settings = {"optim": OptimConfig(), "batch_size": rows, "context_length": 256} | changes
    return estimate(built, world_size, fsdp=fsdp, **settings)


def test_any_number_of_processes():
    parameters = sum(p.numel() for p in build().parameters())
    seen = set()
    for world_size in (8, 16384):
        found = on_gpus(world_size, FsdpConfig(strategy="full-shard", precision="mixed"))
        share = 4 * parameters / world_size
        # AdamW's two moments; a rank has no less than one row of a matrix
        assert share <= found.state["parameters"] == found.state["gradients"] <= share + 4 * 172 * 64
        assert found.checkpoint == 12 * parameters + 4 * len({*build().parameters()})
        seen.add(found.tokens // world_size)
    assert seen == {256}
    hybrid = on_gpus(16384, FsdpConfig(strategy="hybrid-shard", precision="mixed"))
    assert hybrid.fsdp.shard_size == 8 and {link for _, link in hybrid.work.sent} == {"inside", "between"}
    kinds = {kind for kind, link in hybrid.work.sent if link == "between"}
    assert kinds == {"all-reduce"}


def test_what_is_sent():
    """Full fine-tuning gathers every block in the forward and again in the backward, the ends once, and sums all once."""
    found = on_gpus(8, FsdpConfig(strategy="full-shard", precision="mixed"))
    model = build()
    ends = model.lm_head.weight.numel() + model.model.norm.weight.numel()
    blocks = sum(p.numel() for p in model.parameters()) - ends
    padded = 1.05  # 172 rows are 8 times 22, not 21.5
    gathered = 2 * (2 * blocks + ends) * 7 / 8  # bf16
    assert gathered <= found.work.sent["all-gather", "inside"] <= padded * gathered
    summed = 4 * (blocks + ends) * 7 / 8  # fp32
    assert summed <= found.work.sent["reduce-scatter", "inside"] <= padded * summed


def test_fewer_layers_and_rows_tell_of_more():
    fsdp = FsdpConfig(strategy="full-shard", precision="mixed", recompute="selective")
    corners = {(d, b): on_gpus(8, fsdp, layers=d, rows=b, method="lora") for d in DEPTHS for b in BATCHES}
    guess, found = between(corners, 5, 4), on_gpus(8, fsdp, layers=5, rows=4, method="lora")
    assert guess.peak == pytest.approx(found.peak, rel=0.03)
    assert guess.work.flops == pytest.approx(found.work.flops, rel=1e-6)
    assert guess.state == found.state and guess.tokens == found.tokens


def test_the_peak_of_more_layers_can_be_elsewhere():
    """At the end of the backward, where all gradients are, and not at its start."""
    fsdp = FsdpConfig(strategy="full-shard", precision="mixed", recompute="full")
    more, found = (
        {(d, 1): on_gpus(2, fsdp, layers=d, context_length=128) for d in depths} for depths in (DEPTHS, (12,))
    )
    found = found[12, 1]
    assert found.peaks["end of backward"].size == found.peak
    assert between(more, 12, 1).peak == pytest.approx(found.peak, rel=0.001)


def test_what_is_offloaded_is_on_the_host():
    found = on_gpus(8, FsdpConfig(strategy="full-shard", precision="mixed", cpu_offload=True))
    assert found.host > found.state["optimizer"] > 0
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
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 1}))
    lora = ("--method", "lora", "--lora.rank", 4, "--lora.targets", "q_proj", "o_proj")
    flags = ("--model", tmp_path / "config.json", *lora)
    flags += ("--gpu", "rtx4090-24", "--optim.kind", "anyprecision", "--context-length", 64)
    codes, text = run_script(TOOLS / "estimate.py", *flags, "--advise", log=tmp_path / "log")
    assert codes == [0], text
    rates = [int(line.split()[0].replace(",", "")) for line in text.splitlines() if " --fsdp.strategy " in line[:40]]
    assert len(rates) == 6 and rates == sorted(rates, reverse=True)
    assert "the fewest rtx4090-24 that hold a step: 1" in text
    # what the printed command would need is what was estimated
    python, recipe, *words = shlex.split(re.search(r"^command +(.*)$", text, re.M)[1])
    assert python == "python" and recipe == "recipes/lora_fsdp.py" and str(tmp_path) in words
    codes, of_recipe = run_script(TOOLS.parent / recipe, *words, "--estimate", 1, log=tmp_path / "log")
    assert codes == [0], of_recipe
    for line in ("peak", "state", "computed"):
        [one], [other] = (re.findall(rf"^{line} .*$", each, re.M) for each in (text, of_recipe))
        assert one == other


def tool():
    spec = importlib.util.spec_from_file_location("estimate_tool", TOOLS / "estimate.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_comparison_and_a_command_for_several_machines(tmp_path, capsys):
    estimate_tool = tool()
    tiny = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(TINY | tiny))
    flags = estimate_tool.Config(model=str(tmp_path), compare=("rtx4090-24", "1xh100-80"), context_length=64)
    estimate_tool.main(flags)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| full", "| LoRA", "| LoRA, int8", "| LoRA, nf4"]
    assert all(re.match(r"1: \*\*[\d.]+ GiB\*\*, [\d,]+ tokens/s$", row[1]) for row in rows)
    assert all(re.match(r"\*\*[\d.]+ GiB\*\*, [\d,]+ tokens/s \|$", row[2]) for row in rows)
    command = estimate_tool.command(
        estimate_tool.Config(model="llama3-8b", method="full", gpus=24), 24, FsdpConfig(precision="mixed"), 2
    )
    assert command == (
        "torchrun --nproc_per_node 8 --nnodes 3 --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 recipes/full_fsdp.py "
        "--model meta-llama/Llama-3.1-8B --output-dir out --train.batch-size 2 --train.accumulate 1 "
        "--data.context-length 4096 --fsdp.precision mixed"
    )


def test_what_the_tool_is_given_is_in_its_command(capsys):
    """Also a learning rate that is OptimConfig's default, and not the recipe's."""
    estimate_tool = tool()
    for optim, said in (({}, ""), ({"lr": 1e-4}, " --optim.lr 0.0001"), ({"gamma": 0.5}, " --optim.gamma 0.5")):
        flags = estimate_tool.Config(model="llama3-8b", method="full", optim=estimate_tool.OptimFlags(**optim))
        command = estimate_tool.command(flags, 1, FsdpConfig(precision="mixed"), 2)
        assert command.partition(" --fsdp.precision mixed")[2] == said
        assert flags.optim.config == OptimConfig(**optim)
    with pytest.raises(UserError, match=r"--optim.lr 0: must be"):
        estimate_tool.OptimFlags(lr=0)


def test_a_method_that_is_not_possible_is_a_row_of_the_comparison(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 1}))
    estimate_tool = tool()
    flags = estimate_tool.Config(model=str(tmp_path), compare=("1xrtx4090-24", "1xh100-80"), context_length=64)
    estimate_tool.main(flags)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 4 and all("tokens/s" in row for row in rows[:3])
    assert rows[3].startswith("| LoRA, nf4 | not possible: nf4 cannot hold ") and rows[3].endswith(" as int8 | - |")


@pytest.mark.parametrize(
    "machine, needed, expected",
    [(8, 3, 4), (8, 8, 8), (8, 9, 16), (8, 270, 272), (6, 5, 6), (6, 7, 12), (8, 5000, 0)],
)
def test_the_fewest_are_one_machine_or_whole_ones(machine, needed, expected):
    asked = []

    class Counting(Adviser):
        def fits(self, found):
            return found >= needed

        def whole(self, fsdp, world_size, batch_size=1):
            asked.append(world_size)
            return world_size

    assert Counting(None, 1, "h100-80", 50.0, {"machine": machine}).fewest(FsdpConfig(precision="mixed")) == expected
    assert all(size % machine == 0 or size < machine for size in asked) and len(asked) <= 16


def test_a_quantised_folder_from_its_config_alone():
    def layers(settings):
        with torch.device("meta"):
            model = Llama(replace(STORIES, intermediate_size=192))
        return {name: layer.kind for name, layer in quantized_layers(quantize_base(model, settings)).items()}

    for kind in ("nf4", "int8"):
        settings = quantization_config(kind, torch.bfloat16)
        assert set(layers(settings).values()) == {kind} and len(layers(settings)) == 2 * 7
        settings["llm_int8_skip_modules"] = ["lm_head", "down_proj", "model.layers.1.self_attn"]
        assert len(left := layers(settings)) == 2 * 6 - 4
        assert "model.layers.1.self_attn.q_proj.weight" not in left and "model.layers.1.mlp.up_proj.weight" in left
    assert not layers({})
