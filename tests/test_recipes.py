"""The recipes as users run them: what they leave behind, and what they say to mistakes."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_model, run_script, save_folder
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_model import hf_reference
from transformers import AutoModelForCausalLM

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.data.cache import open_packed, prepare
from minillama.data.datasets import DataConfig
from minillama.formats.hf import base_parameters, from_pretrained
from minillama.inference.generate import generate
from minillama.parallel.initialise import initialise
from minillama.tokenizer.tokenizer import load_tokenizer

RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE = RECIPES / "lora_fsdp.py"
ROWS = [{"dialogue": f"A: {'hi ' * (i % 5)}\nB: bye {i}", "summary": f"They part, {i}."} for i in range(12)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.json").write_text(json.dumps(ROWS))
    (folder / "val.jsonl").write_text("\n".join(map(json.dumps, ROWS[:5])))
    return folder


@pytest.fixture
def run(tiny_folder, data, tmp_path):
    def run(*flags, recipe="lora", model=tiny_folder, out="out", world_size=1, rows=True):
        paths = ["--data.path", data / "train.json", "--data.val-path", data / "val.jsonl"] if rows else []
        common = [
            "--model",
            model,
            "--output-dir",
            tmp_path / out,
            "--device",
            "cpu",
            "--data.context-length",
            200,
            *paths,
        ]
        codes, text = run_script(
            RECIPES / f"{recipe}_fsdp.py", *common, *flags, world_size=world_size, log=tmp_path / "log"
        )
        return codes, text, tmp_path / out

    return run


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if "loss" in m], [m for m in lines if "eval_loss" in m]


FAST = ("--optim.lr", 0.02, "--optim.schedule", "constant", "--train.batch-size", 2, "--fsdp.precision", "fp32")


def test_a_run_on_two_ranks_leaves_what_it_should(run, tiny_folder, data):
    codes, text, out = run(*FAST, "--train.epochs", 2, "--train.clip-norm", 1.0, world_size=2)
    assert codes == [0, 0], text
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "checkpoints", "loss.png", "metrics.jsonl", "run.json"]
    trained, evaluated = metrics(out)
    config = DataConfig(path=data / "train.json", context_length=200)
    packs = len(open_packed(prepare(config, load_tokenizer(tiny_folder), 42, validation=False)[0]))
    per_epoch = -(-packs // 4)
    assert [m["step"] for m in trained] == list(range(1, 2 * per_epoch + 1))
    assert [m["step"] for m in evaluated] == [0, per_epoch, 2 * per_epoch]
    assert trained[-1]["epoch"] == 2 and evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] - 0.5
    keys = "step epoch loss lr grad_norm tokens trained_tokens tokens_per_s tflops mfu peak_memory_gib data_wait_s"
    assert all(set(m) == set(keys.split()) for m in trained)
    assert sum(m["trained_tokens"] for m in trained) == 2 * sum(len(r["summary"].encode()) + 1 for r in ROWS)
    assert evaluated[0]["eval_tokens"] == sum(len(r["summary"].encode()) + 1 for r in ROWS[:5])
    assert evaluated[0]["eval_perplexity"] == pytest.approx(
        torch.tensor(evaluated[0]["eval_loss"]).exp().item(), rel=1e-4
    )
    saved = json.loads((out / "run.json").read_text())
    assert saved["data"]["packs"] == packs and 0.5 < saved["data"]["efficiency"] <= 1
    assert (
        saved["world_size"] == 2
        and saved["flags"]["optim"]["lr"] == 0.02
        and saved["flags"]["data"]["dataset"] == "samsum"
    )
    tokenizer = load_tokenizer(tiny_folder)
    assert evaluated[0]["eval_loss"] == pytest.approx(loss_of(hf_reference(random_model()), tokenizer), abs=1e-4)
    assert text.count("validation loss") == 3 and text.count("parameters,") == 1  # rank 0 alone speaks

    reference = PeftModel.from_pretrained(hf_reference(random_model()), out / "adapter").eval()
    assert evaluated[-1]["eval_loss"] == pytest.approx(loss_of(reference, tokenizer), abs=1e-4)


def documents(tokenizer, rows=ROWS[:5]):
    """Tokens and labels of each row, (1, T) each."""
    for row in rows:
        prompt = tokenizer.encode(f"Summarize this dialog:\n{row['dialogue']}\n---\nSummary:\n", bos=True)
        answer = tokenizer.encode(row["summary"], eos=True)
        yield torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])


def loss_of(model, tokenizer):
    """What transformers and peft find on the validation rows, one by one, not packed."""
    return mean_loss(model, documents(tokenizer))


@torch.no_grad()
def mean_loss(model, documents):
    total, count = 0.0, 0
    for tokens, labels in documents:
        trained = int((labels[:, 1:] != -100).sum())  # none would be 0 / 0
        total += model(tokens, labels=labels).loss.item() * trained if trained else 0.0
        count += trained
    return total / count


def test_a_tied_model_too(run, tmp_path):
    folder = save_folder(random_model(tie_word_embeddings=True), tmp_path / "tied", tie_word_embeddings=True)
    _, _, out = run(*FAST, "--train.max-steps", 2, model=folder, world_size=2)
    base = hf_reference(random_model(tie_word_embeddings=True), tie_word_embeddings=True)
    evaluated = metrics(out)[1]
    assert evaluated[0]["eval_loss"] == pytest.approx(loss_of(base, load_tokenizer(folder)), abs=1e-4)
    tuned = PeftModel.from_pretrained(base, out / "adapter").eval()
    assert evaluated[-1]["eval_loss"] == pytest.approx(loss_of(tuned, load_tokenizer(folder)), abs=1e-4)


@pytest.mark.parametrize(
    "recipe, group, size", [("lora", "lora", ("rank", 3)), ("llama_adapter", "adapter", ("prompt-len", 3))]
)
def test_training_goes_on_from_an_adapter_folder(run, recipe, group, size):
    flags = (*FAST, "--train.max-steps", 2, "--optim.lr", 0.1)
    _, _, first = run(*flags, f"--{group}.{size[0]}", size[1], recipe=recipe, out="first")
    start = (f"--{group}.from", first / "adapter")
    codes, text, second = run(*flags, *start, recipe=recipe, out="second", world_size=2)
    assert codes == [0, 0] and f"starts from {first}" in text
    before, after = metrics(first)[1], metrics(second)[1]
    assert abs(before[0]["eval_loss"] - before[-1]["eval_loss"]) > 1e-3
    assert after[0]["eval_loss"] == pytest.approx(before[-1]["eval_loss"], rel=1e-6)
    assert after[-1]["eval_loss"] != pytest.approx(after[0]["eval_loss"], rel=1e-4)  # it trains
    configs = [json.loads((out / "adapter" / "adapter_config.json").read_text()) for out in (first, second)]
    assert configs[0] == configs[1]
    codes, text, _ = run(*flags, *start, f"--{group}.{size[0]}", 4, recipe=recipe, out="third")
    assert codes == [1] and "4 was asked for" in text and "has 3: leave it out" in text


@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_leaves_a_model_that_transformers_loads(run, tmp_path, tied):
    folder = save_folder(random_model(tie_word_embeddings=tied), tmp_path / "base", tie_word_embeddings=tied)
    codes, text, out = run(
        *FAST, "--optim.lr", 0.002, "--train.max-steps", 6, recipe="full", model=folder, world_size=2
    )
    assert codes == [0, 0], text
    assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "loss.png", "metrics.jsonl", "model", "run.json"]
    evaluated = metrics(out)[1]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] - 0.1
    reference = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    tokenizer = load_tokenizer(out / "model")
    assert evaluated[-1]["eval_loss"] == pytest.approx(loss_of(reference, tokenizer), abs=1e-4)
    prompt = torch.tensor([tokenizer.encode("Summarize this dialog:\nA: hi", bos=True)])
    expected = reference.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=None)
    found = generate(from_pretrained(out / "model"), prompt[0].tolist(), max_new_tokens=32)
    assert found == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_layers_stay_as_they_are(run, tmp_path, tied):
    folder = save_folder(random_model(tie_word_embeddings=tied), tmp_path / "base", tie_word_embeddings=tied)
    flags = ("--optim.lr", 0.02, "--train.freeze-layers", 2, "--train.max-steps", 2, "--eval.no-enabled")
    _, text, out = run(*flags, recipe="full", model=folder, world_size=2)  # in mixed precision, from fp32 weights
    assert ("frozen      the first 2 blocks, and the embedding" + " with the tied head" * tied) in text
    before, after = (load_file(f / "model.safetensors") for f in (folder, out / "model"))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = ("model.layers.0.", "model.layers.1.", "model.embed_tokens.")
    assert same == {name for name in before if name.startswith(frozen)}


def test_llama_adapter_leaves_what_peft_loads(run, tiny_folder):
    codes, text, out = run(*FAST, "--optim.lr", 0.1, "--train.epochs", 8, recipe="llama_adapter", world_size=2)
    assert codes == [0, 0], text
    evaluated = metrics(out)[1]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] - 0.05
    reference = PeftModel.from_pretrained(hf_reference(random_model()), out / "adapter").eval()
    assert evaluated[-1]["eval_loss"] == pytest.approx(loss_of(reference, load_tokenizer(tiny_folder)), abs=1e-4)
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert config["adapter_layers"] == 3 and config["adapter_len"] == 10  # 30 asked for, 3 there


@pytest.mark.parametrize(("recipe", "precision"), [("full", "fp16"), ("lora", "bf16"), ("llama_adapter", "fp16")])
def test_every_precision_trains(run, tiny_folder, recipe, precision):
    """From the loss that transformers finds, and with the gradient of a plain model in fp32 on all rows one by one."""
    flags = ("--fsdp.precision", precision, "--fsdp.recompute", "selective", "--data.batching", "padding")
    flags += ("--train.batch-size", len(ROWS), "--train.max-steps", 2, "--optim.warmup-steps", 1)
    flags += ("--lora.dropout", 0) if recipe == "lora" else ()
    codes, text, out = run(*flags, recipe=recipe)
    assert codes == [0], text
    assert f"recompute selective\nprecision   {precision}\n" in text
    trained, evaluated = metrics(out)
    tokenizer = load_tokenizer(tiny_folder)
    base = loss_of(hf_reference(random_model()), tokenizer)
    assert evaluated[0]["eval_loss"] == pytest.approx(base, rel=2e-3)

    model = from_pretrained(tiny_folder).requires_grad_(recipe == "full")
    if recipe == "lora":
        apply_lora(model, LoraConfig(dropout=0.0))
    if recipe == "llama_adapter":
        apply_llama_adapter(model, LlamaAdapterConfig())
    initialise(model, 42, loaded=base_parameters(model))
    logits, labels = zip(*((model(t)[0, :-1], of[0, 1:]) for t, of in documents(tokenizer, ROWS)), strict=True)
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    assert trained[0]["loss"] == pytest.approx(loss.item(), rel=2e-3)
    assert trained[0]["grad_norm"] == pytest.approx(norm, rel=1e-2)


def test_accumulation_on_one_rank_is_two_ranks(run):
    flags = (*FAST, "--lora.dropout", 0, "--train.max-steps", 3)
    _, text, one = run(*flags, "--train.accumulate", 2, out="one")
    codes, text, two = run(*flags, "--checkpoint.format", "full", out="two", world_size=2)
    assert codes == [0, 0], text
    # each rank has a seed of its own, of which nothing was drawn: there is no dropout
    random = load_file(two / "checkpoints/step-00000003/random/00001.safetensors")
    assert random.keys() == {"0.cpu", "1.cpu"}
    for rank in range(2):
        assert torch.equal(random[f"{rank}.cpu"], torch.Generator().manual_seed(42 + rank).get_state())
    for a, b in zip(metrics(one)[0], metrics(two)[0], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-5
        )
    a, b = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_flags_of_a_run_again_with_config(run, tmp_path):
    _, _, first = run(
        *FAST, "--train.max-steps", 2, "--lora.dropout", 0.3, "--lora.targets", "q_proj", "o_proj", out="first"
    )
    codes, text = run_script(
        RECIPE, "--config", first / "run.json", "--output-dir", tmp_path / "second", log=tmp_path / "log"
    )
    assert codes == [0], text
    assert [m["loss"] for m in metrics(first)[0]] == [m["loss"] for m in metrics(tmp_path / "second")[0]]
    check_refused(*run("--config", first / "run.json", recipe="full"), "run.json is of another recipe")


def test_logging_every_other_step_averages(run):
    _, _, each = run(*FAST, "--train.epochs", 2, "--eval.no-enabled", out="each")
    _, _, other = run(
        *FAST, "--train.epochs", 2, "--eval.no-enabled", "--log.every", 2, "--log.tensorboard", out="other"
    )
    a, b = metrics(each)[0], metrics(other)[0]
    assert len(b) == -(-len(a) // 2)
    assert b[0]["loss"] == pytest.approx((a[0]["loss"] + a[1]["loss"]) / 2)
    assert b[0]["trained_tokens"] == a[0]["trained_tokens"] + a[1]["trained_tokens"]
    assert list((other / "tensorboard").iterdir())


def test_lora_plus_moves_b_by_a_multiple_of_the_learning_rate(run):
    flags = (*FAST, "--train.max-steps", 1, "--eval.no-enabled")
    _, _, out = run(*flags, "--lora.plus-ratio", 2, world_size=1)
    moved = [t for name, t in load_file(out / "adapter/adapter_model.safetensors").items() if "lora_B" in name]
    largest = max(t.abs().max().item() for t in moved)  # AdamW's first step is lr * g / (|g| + eps), from B = 0
    assert largest == pytest.approx(2 * metrics(out)[0][0]["lr"], rel=1e-3)


def test_a_log_line_does_not_count_the_evaluations_time(run):
    flags = (*FAST, "--train.batch-size", 1, "--train.max-steps", 8, "--log.every", 4)
    _, _, out = run(*flags, "--eval.every", 3)
    started = time.perf_counter()
    _, _, alone = run(*flags, "--eval.no-enabled", out="alone")
    whole = time.perf_counter() - started
    for a, b in zip(metrics(out)[0], metrics(alone)[0], strict=True):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"])
        assert whole > a["tokens"] / a["tokens_per_s"] > 0.1 * b["tokens"] / b["tokens_per_s"]
        assert 0 < a["mfu"] < 1


def test_a_diverged_run_stops_and_says_so(run):
    codes, text, out = run("--optim.lr", 1e38, "--train.batch-size", 1)
    check_refused(codes, text, out, "training has diverged", trained=True)
    assert all(
        "NaN" not in line and "Infinity" not in line for line in (out / "metrics.jsonl").read_text().splitlines()
    )


def test_evaluation_every_few_steps(run):
    _, _, out = run(*FAST, "--train.max-steps", 3, "--eval.every", 2, "--eval.max-steps", 1)
    # each time the same pack of the three, which holds one row
    tokens = len(ROWS[0]["summary"].encode()) + 1
    assert [(m["step"], m["eval_tokens"]) for m in metrics(out)[1]] == [(0, tokens), (2, tokens), (3, tokens)]


def held_out_packs(config, folder):
    """The documents of each, as tokens and labels, (1, T) each."""
    packed = open_packed(prepare(config, load_tokenizer(folder), 42, validation=True)[1])
    documents = []
    for start, size in zip(packed.starts, packed.sizes, strict=True):
        tokens, trained = (
            torch.from_numpy(part[start : start + size].copy())[None]
            for part in (packed.documents.tokens, packed.documents.trained)
        )
        trained[:, 0] = False  # nothing predicts it
        documents.append((tokens.long(), tokens.long().where(trained, -100)))
    return [documents[a:b] for a, b in zip(packed.firsts[:-1], packed.firsts[1:], strict=True)]


@pytest.mark.parametrize("dataset", ["samsum", "alpaca", "grammar", "chat"])
def test_every_bundled_set_trains(run, dataset, tiny_folder):
    codes, text, out = run(
        *FAST, "--data.dataset", dataset, "--data.context-length", 1024, "--train.max-steps", 1, rows=False
    )
    assert codes == [0], text
    assert "DROPPED" not in text and [m["step"] for m in metrics(out)[1]] == [0, 1]
    packs = held_out_packs(DataConfig(dataset=dataset, context_length=1024), tiny_folder)
    held_out = [document for pack in packs for document in pack]
    before = metrics(out)[1][0]
    assert before["eval_tokens"] == sum(int((labels != -100).sum()) for _, labels in held_out)
    assert before["eval_loss"] == pytest.approx(mean_loss(hf_reference(random_model()), held_out), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# mistakes: one message on all ranks together that names the thing, exit code 1, nothing written


def config_without(key):
    return {k: v for k, v in TINY.items() if k != key}


def broken_model(tmp_path, change):
    folder = save_folder(random_model(), tmp_path / "broken")
    change(folder)
    return folder


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


MODELS = {
    "config without architecture": (
        lambda f: (f / "config.json").write_text(json.dumps(config_without("architectures"))),
        "architecture is not supported",
    ),
    "truncated weights": (lambda f: os.truncate(f / "model.safetensors", 9000), "truncated"),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
    "wrong tokenizer": (
        lambda f: (f / "tokenizer.model").write_text((f / "tokenizer.model").read_text() + "YWI= 256\n"),
        "tokenizer has 513 ids, the model 512",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer"),
}


@pytest.mark.parametrize(("change", "message"), MODELS.values(), ids=MODELS)
def test_bad_models(run, tmp_path, change, message):
    check_refused(*run(model=broken_model(tmp_path, change)), message)


FLAGS = {
    "missing model": (["--model", "/nowhere"], "/nowhere does not exist"),
    "unknown dataset": (["--data.dataset", "poems"], "poems is unknown: choose one of samsum"),
    "rows too long": (["--data.context-length", 20], "all 12 rows are longer than --data.context-length 20"),
    "lora target": (["--lora.targets", "z_proj"], '"z_proj" matches no layer'),
    "output folder": (["--output-dir", "/proc/out"], "--output-dir /proc/out cannot be written"),
    "missing data": (["--data.path", "/none.json"], "/none.json does not exist"),
    "impossible number": (["--optim.lr", "nan"], "--optim.lr nan: must be a finite number above 0"),
    "impossible seed": (["--seed", -1], "--seed -1: must be at least 0"),
    "fp16 moments": (
        ["--fsdp.precision", "fp16", "--optim.kind", "anyprecision"],
        "fp16 with --optim.kind anyprecision",
    ),
    "shard size": (
        ["--fsdp.strategy", "hybrid-shard", "--fsdp.shard-size", 3],
        "--fsdp.shard-size 3 does not divide the 1 processes",
    ),
    "frozen layers": (["--train.freeze-layers", 1], "--train.freeze-layers is for full_fsdp.py"),
    "kernels": (["--kernels.attention", "varlen"], "--kernels.attention varlen cannot train on a CPU"),
    "config": (["--config", "/none.json"], "--config /none.json is not the run.json of a run"),
}


@pytest.mark.parametrize(("flags", "message"), FLAGS.values(), ids=FLAGS)
def test_bad_flags(run, flags, message):
    check_refused(*run(*flags), message)


def test_bad_flags_of_the_other_recipes(run):
    message = "--train.freeze-layers 4: the model has 3 layers"
    check_refused(*run("--train.freeze-layers", 4, recipe="full", world_size=2), message)
    check_refused(*run("--adapter.layers", 0, recipe="llama_adapter"), "--adapter.layers 0: must be at least 1")
    message = "--train.freeze-layers is for full_fsdp.py"
    check_refused(*run("--train.freeze-layers", 1, recipe="llama_adapter"), message)


DATA = {
    "empty": ("", "has no rows"),
    "malformed line": ('{"dialogue": "a", "summary": "b"}\n{"dialogue": ', "line 2"),
    "missing field": ('{"dialogue": "a", "summary": "b"}\n\n{"dialogue": "a"}', "line 3: field 'summary' is missing"),
}


@pytest.mark.parametrize(("content", "message"), DATA.values(), ids=DATA)
def test_bad_data(run, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    check_refused(*run("--data.path", tmp_path / "bad.jsonl"), message)


def test_the_same_mistake_on_two_ranks_is_said_once(run):
    check_refused(*run("--lora.targets", "z_proj", world_size=2), '"z_proj" matches no layer')
    check_refused(*run("--output-dir", "/proc/out", world_size=2), "--output-dir /proc/out cannot be written")


@pytest.mark.parametrize(
    "flags",
    [["--lora.rnak", "8"], ["--optim.lr", "fast"], ["--fsdp.precision", "fp12"], ["--train.batch-size", "-3"]],
    ids=str,
)
def test_unknown_flags_and_values_are_named_once(run, flags):
    codes, text, out = run(*flags, world_size=2)
    assert 0 not in codes and not out.exists()
    assert flags[0].lstrip("-") in text and "Traceback" not in text
    assert len(text.splitlines()) < 20
    assert len(re.findall(r"^error: |^╭─", text, re.M)) == 1  # ours, or tyro's box


def test_an_earlier_run_is_not_overwritten(run):
    _, _, out = run(*FAST, "--train.max-steps", 1)
    before = (out / "metrics.jsonl").read_bytes()
    codes, text, _ = run(*FAST, "--train.max-steps", 1)
    assert codes == [1] and "already holds a run" in text
    assert (out / "metrics.jsonl").read_bytes() == before


def check_refused(codes, text, out, message, trained=False):
    assert set(codes) == {1}, text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], text
    assert "Traceback" not in text
    assert (out / "metrics.jsonl").exists() == trained
    assert not (out / "adapter").exists() and not (out / "model").exists()


def test_a_rank_that_dies_ends_the_run(tiny_folder, data, tmp_path):
    """Rank 1 is killed in its second step; the other does not hang and nothing looks finished."""
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, runpy, signal, minillama.training.step as train\n"
        "step, calls = train.train_step, []\n"
        "def dying(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(*args, **kwargs)\n"
        "train.train_step = dying\n"
        f"runpy.run_path({str(RECIPE)!r}, run_name='__main__')\n"
    )
    flags = [
        "--model",
        tiny_folder,
        "--output-dir",
        tmp_path / "out",
        "--data.path",
        data / "train.json",
        "--device",
        "cpu",
    ]
    every = [*flags, "--data.context-length", 200, "--eval.no-enabled", "--train.batch-size", 1]
    (survivor, killed), text = run_script(script, *every, world_size=2, log=tmp_path / "log")
    assert killed is None and survivor not in (0, None), text
    assert not (tmp_path / "out/adapter").exists()


@pytest.mark.parametrize(
    ("recipe", "own"),
    [("full", "--train.freeze-layers"), ("lora", "--lora.targets"), ("llama_adapter", "--adapter.layers")],
)
def test_help_names_every_group(recipe, own, tmp_path):
    codes, text = run_script(RECIPES / f"{recipe}_fsdp.py", "--help", log=tmp_path / "log")
    assert codes == [0]
    for flag in (
        "--model",
        "--data.dataset",
        "--train.batch-size",
        "--eval.no-enabled",
        "--optim.lr",
        "--fsdp.recompute",
        "--kernels.attention",
        own,
    ):
        assert flag in text
