"""What a run writes, and the arithmetic in it."""

import json
import resource

import pytest
import torch
from conftest import random_model
from matplotlib.figure import Figure
from test_packing import documents_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.data.batch import collate
from minillama.data.packing import pack
from minillama.errors import UserError
from minillama.hardware.benchmark import matmul_rate
from minillama.training.flops import count_parameters, step_flops
from minillama.training.metrics import LogConfig, Metrics, _reopen, plot_loss, read_metrics
from minillama.training.plan import Progress
from minillama.training.step import batch_loss


@pytest.mark.parametrize("method", ["lora", "full", "frozen below"])
def test_flops_are_those_a_counter_sees(method):
    model = random_model()
    if method == "lora":
        apply_lora(model.requires_grad_(False), LoraConfig(rank=4, targets=("all-linear",)))
    if method == "frozen below":
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[:2].requires_grad_(False)
    packed = pack(documents_of([64]), 64, 0)
    batch = collate(packed, [0], 0, "cpu")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it cannot see into the fused kernel
        batch_loss(model, batch).backward()
    attention = (6 + 2 + 2 if method == "frozen below" else 18) * 32 * 64**2
    ours = step_flops(model, batch.count, batch.trained, batch.squares)
    weights = ours - attention
    by_op = counter.get_flop_counts()["Global"]
    matmuls = sum(n for op, n in by_op.items() if "bmm" not in str(op))
    # the counter counts the input gradient of the first block too, or not: at most a few per cent of so small a model
    assert weights == pytest.approx(matmuls, rel=0.05)
    # the whole square of scores, of which causal attention needs half
    assert sum(n for op, n in by_op.items() if "bmm" in str(op)) == 2 * attention


def test_parameters_and_rate(monkeypatch):
    model = apply_lora(random_model().requires_grad_(False), LoraConfig(rank=4))
    total, trainable = count_parameters(model)
    assert trainable == 3 * (4 * (32 + 32) + 4 * (32 + 16)) and total - trainable == sum(
        p.numel() for p in random_model().parameters()
    )
    # a product of 128 takes 1 ms, too short to time; one of 256 takes 4 at best
    seconds = iter([1, 1, 1, 5, 4, 6, 7, 5, 9, 4, 6])
    ends = (moment for taken in seconds for moment in (0, taken / 1000))
    monkeypatch.setattr("minillama.hardware.benchmark.time.perf_counter", lambda: next(ends))
    assert matmul_rate("cpu", torch.float32) == pytest.approx(2 * 256**3 / 0.004)


def test_plot_and_read(tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or savefig(self, *a, **k))
    lines = [
        {"step": 0, "eval_loss": 3.0},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained, evaluated = read_metrics(tmp_path / "metrics.jsonl")
    assert [m["loss"] for m in trained] == [2, 1] and [m["eval_loss"] for m in evaluated] == [3, 2]
    assert plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = drawn[0].axes[0].get_xticks()
    assert len(steps) > 1 and all(step == int(step) for step in steps)


def test_loss_margin_and_accuracy_of_pairs_below_each_other(tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or savefig(self, *a, **k))
    names = ("loss", "reward_margin", "accuracy")
    trained = [{"step": 1 + n, "loss": 0.7 - n / 8, "reward_margin": n / 4, "accuracy": 0.5 + n / 16} for n in range(3)]
    evaluated = [{"step": 3 * n} | {f"eval_{name}": 1.0 + n + k for k, name in enumerate(names)} for n in range(2)]
    lines = [evaluated[0], *trained, evaluated[1]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    said = ("loss (mean over pairs)", "reward margin (mean over pairs)", "accuracy (mean over pairs)")
    for axes, name, label in zip(drawn[0].axes, names, said, strict=True):
        found = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in axes.get_lines()}
        assert axes.get_ylabel() == label and found == {
            "training": [(m["step"], m[name]) for m in trained],
            "validation": [(m["step"], m[f"eval_{name}"]) for m in evaluated],
        }


def test_a_logger_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("minillama.training.metrics.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--log\.wandb needs a package: pip install wandb"):
        LogConfig(wandb=True)


def test_a_full_disk_is_one_message_and_no_half_line(tmp_path):
    metrics, before = object.__new__(Metrics), resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics.file = _reopen(tmp_path / "metrics.jsonl", Progress(packs_per_step=1))
    metrics.tensorboard = metrics.wandb = None
    metrics._write({"step": 1, "loss": 2.0})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, before[1]))
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(.*\): make room on its disk"):
            metrics._write({"step": 2, "loss": 1.0})
        with pytest.raises(UserError, match=r"loss\.png cannot be written \(.*\): make room on its disk"):
            plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole and not (tmp_path / "loss.png").exists()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl was removed while the run wrote to it"):
        metrics._write({"step": 2, "loss": 1.0})
    metrics.file.close()
    (tmp_path / "folder/metrics.jsonl/x").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be .* \(Is a directory\)"):
        _reopen(tmp_path / "folder/metrics.jsonl", Progress(packs_per_step=1))


def test_numbers_too_large_to_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1e308}')
    with pytest.raises(UserError, match=r"metrics\.jsonl: its numbers are too large to be drawn"):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
