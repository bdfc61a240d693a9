"""tools/bench.py: ours and transformers + peft do the same work, the floor has the products of a step, the JSON."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import run_script
from torch.utils.flop_counter import FlopCounterMode

TOOL = Path(__file__).parents[1] / "tools" / "bench.py"


def test_contenders_train_the_same_model_on_the_same_documents(tmp_path):
    flags = ["--shape", "tiny", "--precision", "fp32", "--documents", "packed", "--context-length", 300, "--floor"]
    flags += ["--batch-size", 2, "--warmup", 1, "--steps", 2, "--rounds", 1, "--threads", 1, "--device", "cpu"]
    folder = tmp_path / "new" / "folder"
    codes, text = run_script(TOOL, *flags, "--method", "lora", "--all", folder, log=tmp_path / "log")
    assert codes == [0], text
    assert sorted(path.name for path in folder.iterdir()) == ["plot.png", "results.json", "table.txt"]
    assert (folder / "table.txt").read_text() in text
    results = json.loads((folder / "results.json").read_text())
    [case] = results["cases"]
    ours, hf, floor = (case["contenders"][name] for name in ("ours", "hf", "floor"))
    # Adapters are not zero and documents do not attend to each other: another scale, mask or label would show.
    assert len(ours["losses"]) == 3
    assert ours["losses"] == pytest.approx(hf["losses"], rel=1e-6)
    assert ours["norms"] == pytest.approx(hf["norms"], rel=1e-4)
    assert case["loss_difference"]["hf"] < 1e-6
    assert case["ratios"]["hf"]["median"] == pytest.approx(ours["turns"][0] / hf["turns"][0])
    for result in (ours, hf, floor):
        assert result["tokens_per_s"]["least"] <= result["tokens_per_s"]["median"] <= result["tokens_per_s"]["most"]
        assert 0 < result["mfu"] < 1 and 0.1 < result["peak_gib"] < 4 and result["versions"]["torch"]
    assert floor["parts_s"].keys() == {"matmuls", "attention"}
    assert "tiny lora 2 x 300, packed documents of 50 to 400 tokens, fp32" in text


def test_losses_alone_are_those_of_pytorch(tmp_path):
    flags = ["--loss", "--shape", "tiny", "--method", "full", "--precision", "fp32", "--context-length", 70]
    flags += ["--warmup", 1, "--steps", 1, "--rounds", 1, "--threads", 1, "--device", "cpu"]
    codes, text = run_script(TOOL, *flags, "--json", tmp_path / "results.json", log=tmp_path / "log")
    assert codes == [0], text
    [case] = json.loads((tmp_path / "results.json").read_text())["cases"]
    logits = case["contenders"].pop("logits")
    for name, result in case["contenders"].items():
        if "no F.linear_cross_entropy" not in result.get("error", ""):
            assert result["losses"] == pytest.approx(logits["losses"], rel=1e-6), name
            assert result["norms"] == pytest.approx(logits["norms"], rel=1e-5), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_floor_has_the_matrix_products_of_a_step(method, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent / "bench_parts"))
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from bench import shape_config
    from floor import floor_layers, floor_products
    from work import fill, make_model, make_work

    job = {"config": asdict(shape_config("tiny")), "method": method, "targets": ["v_proj", "gate_proj"]}
    job |= {"batch_size": 1, "context_length": 200, "documents": "packed"}
    model, work = make_model(job), make_work(job, 0)
    model.to_empty(device="cpu").tie_weights()
    fill(model.named_parameters(), 64)
    with FlopCounterMode(display=False) as counter:
        model(work.tokens, positions=work.positions, labels=work.labels).backward()
    products = sum(2 * n * k * m for n, k, m in floor_products(model, 200, work.trained))
    assert products == counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert floor_layers(model) == [True, True]
    for name in ("bench", "floor", "work"):
        del sys.modules[name]
