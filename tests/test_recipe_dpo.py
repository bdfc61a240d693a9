"""Preference tuning on several ranks, and recipes/dpo_fsdp.py as users run it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import random_model, run_ranks, run_script
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_distributed import whole
from test_dpo import pairs
from test_model import hf_reference
from transformers import AutoModelForCausalLM

from minillama.adapters.lora import LoraConfig, apply_lora, lora_off
from minillama.data.batch import collate
from minillama.data.packing import pack, pad
from minillama.formats.hf import load_weights, read_config
from minillama.model.llama import Llama
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.processes import all_reduce
from minillama.parallel.sharding import FsdpConfig, make_mesh, set_dtypes, shard
from minillama.tokenizer.tokenizer import load_tokenizer
from minillama.training.dpo import DpoConfig, DpoLoss, FrozenWeights
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.step import evaluate, train_step

RECIPE = Path(__file__).parents[1] / "recipes" / "dpo_fsdp.py"


def two_steps(mesh, folder, cases):
    """Of each case: (loss, gradient norm) of two steps on all pairs and an evaluation, what is told, the weights."""
    results = []
    for kind, strategy, packing, batch_size in cases:
        fsdp = FsdpConfig(strategy=strategy, precision="fp32", shard_size=2 if strategy == "hybrid-shard" else 0)
        with torch.device("meta"):
            model = Llama(read_config(folder)).requires_grad_(kind == "full")
            if kind == "lora":
                apply_lora(model, LoraConfig(rank=4, dropout=0.0, targets=("q_proj", "v_proj")))
        set_dtypes(model, fsdp)
        shard(model, make_mesh(fsdp, "cpu"), fsdp)
        materialise(model, "cpu")
        initialise(model, 7, loaded=load_weights(model, folder))
        optimizer = make_optimizer(model.parameters(), OptimConfig(lr=1e-2 if kind == "lora" else 1e-3))
        packed = (pack if packing else pad)(pairs(8), 64, *[0] * packing)
        loss = DpoLoss(DpoConfig(), lora_off if kind == "lora" else FrozenWeights(model), "cpu")
        parts = packed.micro_batches(np.arange(len(packed)), batch_size, dist.get_rank(), dist.get_world_size())
        batches = [collate(packed, packs, 0, "cpu") for packs in parts]
        numbers = []
        for _ in range(2):
            total, norm = train_step(model, optimizer, batches, loss_function=loss)
            numbers += [total.item(), norm.item()]
        numbers.append(evaluate(model, iter(batches), loss_function=loss)[0])
        results.append((numbers, all_reduce(loss.sums.tolist()), whole(model)))
    return results


def test_every_split_of_the_same_pairs_trains_the_same(tiny_folder):
    expected = dict(
        zip(
            ("full", "lora"),
            run_ranks(two_steps, 1, tiny_folder, [(kind, "full-shard", False, 8) for kind in ("full", "lora")])[0],
            strict=True,
        )
    )
    for numbers, told, _ in expected.values():
        assert numbers[0] == pytest.approx(np.log(2)) and numbers[4] < numbers[2] < numbers[0] and told[0] == 24
    splits = {
        1: [("full", "no-shard", True, 2), ("lora", "full-shard", False, 3)],
        2: [("full", "shard-grad-op", False, 2), ("lora", "no-shard", True, 1), ("lora", "full-shard", True, 8)],
        4: [("full", "hybrid-shard", True, 1), ("full", "full-shard", False, 1), ("lora", "hybrid-shard", False, 1)],
    }
    for world_size, cases in splits.items():
        for results in run_ranks(two_steps, world_size, tiny_folder, cases):
            for (kind, *case), (numbers, told, weights) in zip(cases, results, strict=True):
                found, wanted = (numbers, told, weights), expected[kind]
                for one, other, atol in zip(found, wanted, (1e-6, 1e-4, 2e-4), strict=True):
                    torch.testing.assert_close(
                        one, other, rtol=1e-5, atol=atol, msg=f"{kind} {world_size} {case}: {one} {other}"
                    )


ROWS = [
    {"prompt": f"Say {i}", "chosen": f"{'yes ' * (i % 4)}{i}.", "rejected": f"No{', never' * (i % 3)} {i}!"}
    for i in range(12)
]
FAST = ("--optim.schedule", "constant", "--train.batch-size", 2, "--fsdp.precision", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "val.jsonl").write_text("\n".join(map(json.dumps, ROWS[:5])))
    return folder


@pytest.fixture
def run(tiny_folder, data, tmp_path):
    def run(*flags, out="out", rows="train", world_size=1):
        paths = ("--data.path", data / f"{rows}.jsonl", "--data.val-path", data / "val.jsonl")
        common = ("--model", tiny_folder, "--output-dir", tmp_path / out, "--data.context-length", 300, *paths, *FAST)
        codes, text = run_script(RECIPE, *common, *flags, world_size=world_size, log=tmp_path / "log")
        return codes, text, tmp_path / out

    return run


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if "loss" in m], [m for m in lines if "eval_loss" in m]


TOLD = ("loss", *DpoLoss.names)


def margins(model, reference, tokenizer, beta=0.1):
    """Of each validation pair, by transformers' models; and the estimated KL divergence, a mean over answers."""
    found, kl = [], []
    for row in ROWS[:5]:
        ratios = []
        for answer in (row["chosen"], row["rejected"]):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
            ids, mask = (torch.tensor(part) for part in tokenizer.encode_chat(turns))
            with torch.no_grad():
                logps = [of(ids[None]).logits[0, :-1].log_softmax(-1) for of in (model, reference)]
            ours, theirs = (logp.gather(-1, ids[1:, None])[:, 0][mask[1:]] for logp in logps)
            ratios.append((ours - theirs).sum())
            kl.append(((ours - theirs).exp() - 1 - (ours - theirs)).sum().item())
        found.append(beta * (ratios[0] - ratios[1]).item())
    return np.array(found), np.mean(kl)


def evaluated(flags, tmp_path):
    """What recipes/evaluate.py finds, of the last column."""
    flags = [*flags, "--dtype", "fp32", "--device", "cpu", "--output", tmp_path / "found.json"]
    codes, text = run_script(RECIPE.with_name("evaluate.py"), *flags, log=tmp_path / "log")
    assert codes == [0], text
    return json.loads((tmp_path / "found.json").read_text())["results"].popitem()[1]


def test_lora_on_two_ranks_is_one_rank_with_the_reference_precomputed(run, tiny_folder, data, tmp_path):
    flags = ("--optim.lr", 0.01, "--train.epochs", 2, "--log.every", 2)
    codes, text, two = run(*flags, out="two", world_size=2)
    assert codes == [0, 0], text
    text_of_two = text
    assert "chat        Llama 3's format, as the tokenizer has no chat template" in text
    assert "12 pairs" in text and sorted(p.name for p in two.iterdir()) == [
        "adapter",
        "checkpoints",
        "loss.png",
        "metrics.jsonl",
        "run.json",
    ]
    codes, text, one = run(*flags, "--train.accumulate", 2, "--dpo.precompute", "--data.batching", "padding", out="one")
    assert codes == [0] and text.count("reference   its log-probabilities of") == 2, text
    before, after = metrics(two)[1][0], metrics(two)[1][-1]
    for m in (before, after):
        assert set(m) == {"step", *(f"eval_{name}" for name in TOLD)} and m["eval_pairs"] == 5
    assert before["eval_loss"] == pytest.approx(np.log(2)) and before["eval_accuracy"] == 0.5
    assert metrics(one)[1][0] == pytest.approx(before, rel=1e-5, abs=1e-5)
    reference = PeftModel.from_pretrained(hf_reference(random_model()), two / "adapter").eval()
    found, kl = margins(reference, hf_reference(random_model()), load_tokenizer(tiny_folder))
    assert after["eval_reward_margin"] == pytest.approx(found.mean(), abs=1e-4)
    assert after["eval_accuracy"] == (found > 0).mean() > 0.5
    assert after["eval_loss"] == pytest.approx(np.log1p(np.exp(-found)).mean(), abs=1e-4)
    assert after["eval_kl"] == pytest.approx(kl, rel=1e-3)
    [command] = re.findall("next: python recipes/(evaluate.py .*)", text_of_two)
    assert command == f"evaluate.py --model {tiny_folder} --adapter {two}/adapter --data.dataset preference " + (
        f"--data.path {data}/val.jsonl --data.context-length 300"
    )
    measured = evaluated(command.split()[1:], tmp_path)
    assert measured.keys() == after.keys() - {"step"}
    assert measured == pytest.approx({name: after[name] for name in measured}, rel=1e-5, abs=1e-5)
    flags = ["--model", tiny_folder, "--data.dataset", "preference", "--data.path", data / "val.jsonl", "--samples", 2]
    codes, text = run_script(RECIPE.parents[1] / "tools/inspect_data.py", *flags, log=tmp_path / "log")
    assert codes == [0] and "5 pairs, 10 documents" in text and text.count("chosen: ") == text.count("rejected: ") == 2
    shown = re.findall(r"Say (\d)<\|eot_id\|>.*⟦\s*(.*)<\|eot_id\|>⟧", text)
    expected = {(str(i), ROWS[i][answer]) for i in range(5) for answer in ("chosen", "rejected")}
    assert len(shown) == 4 and set(shown) <= expected, text


@pytest.mark.parametrize("method", ["full", "lora from"])
def test_a_resumed_run_goes_on_against_the_same_reference(run, method, tiny_folder, data, tmp_path):
    flags = ["--method", "full", "--optim.lr", 0.001]
    if method == "lora from":
        _, _, first = run("--train.max-steps", 2, "--optim.lr", 0.01, "--eval.no-enabled", out="first")
        flags = ["--lora.from", first / "adapter", "--optim.lr", 0.01]
    flags += [
        "--train.epochs",
        3,
        "--checkpoint.every",
        2,
        "--checkpoint.keep",
        0,
        "--log.every",
        3,
        "--eval.no-enabled",
    ]
    _, text, whole_run = run(*flags, out="whole")
    text_of_whole = text
    assert (whole_run / ("model" if method == "full" else "adapter")).is_dir(), text
    start = whole_run / "checkpoints" / "step-00000002"
    codes, text, rest = run(*flags, "--resume", start, out="rest")
    assert codes == [0], text
    expected, found = (metrics(out)[0] for out in (whole_run, rest))
    assert expected[0]["loss"] > expected[-1]["loss"]
    assert [[m[name] for name in TOLD] for m in found] == [[m[name] for name in TOLD] for m in expected]
    codes, text, _ = run(*flags, "--resume", start, "--dpo.beta", 0.2, out="other")
    assert codes == [1] and "--dpo.beta 0.2 (was 0.1)" in text
    if method == "lora from":  # a reference of another content, in a folder of the same form
        other = tmp_path / "other_adapter"
        other.mkdir()
        for file in (first / "adapter").iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        tensors = load_file(other / "adapter_model.safetensors")
        save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, other / "adapter_model.safetensors")
        codes, text, out = run(*flags, "--resume", start, "--lora.from", other, out="other")
        assert codes == [1] and "give the --lora.from that this run began with" in text and not out.exists(), text
    [command] = re.findall("next: python recipes/evaluate.py (.*)", text_of_whole)
    if method == "full":
        assert command.endswith(f" --reference {tiny_folder}")
        tuned = AutoModelForCausalLM.from_pretrained(whole_run / "model", dtype=torch.float32).eval()
        reference = hf_reference(random_model())
    else:
        assert command.endswith(f" --reference {first}/adapter")
        folders = (whole_run / "adapter", first / "adapter")
        tuned, reference = (
            PeftModel.from_pretrained(hf_reference(random_model()), folder).eval() for folder in folders
        )
    found, kl = margins(tuned, reference, load_tokenizer(tiny_folder))
    measured = evaluated(command.split(), tmp_path)
    assert measured["eval_reward_margin"] == pytest.approx(found.mean(), abs=1e-4) and measured["eval_pairs"] == 5
    assert measured["eval_accuracy"] == (found > 0).mean() and measured["eval_kl"] == pytest.approx(kl, rel=1e-3)


def test_simpo_of_all_weights(run):
    """Without a reference: the margin is that of the log-probabilities a token, and rises; evaluate.py needs none either."""
    flags = ("--method", "full", "--dpo.loss", "simpo", "--dpo.beta", 2, "--dpo.gamma", 1, "--optim.lr", 0.001)
    codes, text, out = run(*flags, "--train.epochs", 4)
    assert codes == [0], text
    _, (*_, before, after) = metrics(out)
    assert set(after) == {"step", *(f"eval_{name}" for name in TOLD if name != "kl")}
    assert after["eval_reward_margin"] > before["eval_reward_margin"] and after["eval_loss"] < before["eval_loss"]
    [command] = re.findall("next: python recipes/evaluate.py (.*)", text)
    assert command.endswith(" --dpo.beta 2.0 --dpo.loss simpo --dpo.gamma 1.0")
    measured = evaluated(command.split(), out.parent)
    assert measured == pytest.approx({name: after[name] for name in measured}, rel=1e-5, abs=1e-5)


MISTAKES = {
    "no pairs": (["--data.dataset", "chat"], "--data.dataset chat has no pairs of answers: give preference"),
    "all trained": (["--data.train-on", "all"], "--data.train-on all: of a pair only the answers count"),
    "split": (["--data.too-long", "split"], "--data.too-long split: a pair cannot be split"),
    "lora and full": (["--method", "full", "--lora.rank", 4], "--method full trains all weights"),
    "LoRA+ of nothing": (["--lora.plus-ratio", 0], "--lora.plus-ratio 0.0: must be a finite number above 0"),
    "bad row": ([], "bad.jsonl, line 3: chosen and rejected are the same"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(run, data, flags, message):
    rows = [*ROWS[:2], ROWS[2] | {"rejected": ROWS[2]["chosen"]}, *ROWS[3:]]
    (data / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    codes, text, out = run(*flags, rows="bad")
    assert codes == [1] and message in text and "Traceback" not in text and not out.exists()


def test_other_recipes_refuse_pairs(tiny_folder, data, tmp_path):
    flags = ("--data.dataset", "preference", "--data.path", data / "train.jsonl", "--eval.no-enabled")
    codes, text = run_script(
        RECIPE.with_name("lora_fsdp.py"),
        *("--model", tiny_folder, "--output-dir", tmp_path / "out", *flags),
        log=tmp_path / "log",
    )
    assert codes == [1] and "only recipes/dpo_fsdp.py trains on" in text
