"""What README and docs say exists, and their snippets run as they stand there."""

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import random_model, run_ranks
from test_layering import PACKAGES

import minillama
from minillama import shard, train_step
from minillama.adapters.llama_adapter import LlamaAdapterConfig
from minillama.adapters.lora import LoraConfig
from minillama.data.batch import collate
from minillama.data.cache import open_packed, prepare
from minillama.data.datasets import DataConfig, load_collator
from minillama.data.documents import Documents
from minillama.data.packing import pack
from minillama.errors import UserError
from minillama.formats.hf import load_weights, read_config
from minillama.inference.generate import stream
from minillama.model.llama import Llama
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.sharding import FsdpConfig, set_dtypes
from minillama.tokenizer.tokenizer import load_tokenizer
from minillama.training.config import RunConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text()
    for file in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
    if file.name != "CHANGELOG.md"
}
TEXTS = (".py", ".md", ".toml", ".sbatch", ".txt")
EVERYWHERE = "\n".join(PAGES.values())


def blocks(page, *languages):
    """The code blocks of a page, in these languages or all."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.S | re.M)
    return [code for language, code in found if not languages or language in languages]


COMMANDS = [
    shlex.split(line)
    for page in PAGES
    for line in "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    if re.search(r"recipes/\w+\.py --", line)
]


# The tree


def tree_paths():
    """Every path that the README's tree lists; a folder ends with a slash."""
    [tree] = [block for block in blocks("README.md", "") if block.startswith("minillama/")]
    paths, above = [], []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], name]
        paths.append("".join(above))
    return paths


def test_the_tree_lists_every_file_and_no_other():
    """A folder without lines of its own below it stands for all that is in it."""
    listed = tree_paths()
    assert len(set(listed)) == len(listed) > 20
    assert not [path for path in listed if not (ROOT / path).exists()]
    files = {path for path in listed if not path.endswith("/")}
    closed = {path for path in set(listed) - files if not any(p != path and p.startswith(path) for p in listed)}
    for top in ("minillama", "recipes", "tools", "tests", "docs"):
        for file in (ROOT / top).rglob("*"):
            path = file.relative_to(ROOT).as_posix()
            if file.is_dir() or "__pycache__" in path or file.name in ("__init__.py", "py.typed"):
                continue
            assert path in files or any(path.startswith(folder) for folder in closed), f"{path} is not in the tree"
    packages = [
        path.split("/")[1].removesuffix(".py")
        for path in listed
        if re.fullmatch(r"minillama/(\w+/|files\.py|progress\.py)", path)
    ]
    assert packages == [*PACKAGES, "bundled"]  # in the order in which they may import each other


# Pages and links


def test_no_file_holds_what_a_merge_left():
    folders = [ROOT / top for top in ("minillama", "recipes", "tools", "tests", "docs")]
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in folder.rglob("*.*"))]
    marks = re.compile(r"^(<{7}|>{7}) ", re.M)
    assert not [file for file in files if file.suffix in TEXTS and marks.search(file.read_text())]


def test_readme_begins_with_what_a_newcomer_needs():
    first = "\n".join(README.splitlines()[:60])
    needed = ["![", "## Install", "## Quickstart", "make demo", "make test", "| recipe |"]
    needed += [f"recipes/{file.name}" for file in (ROOT / "recipes").glob("*.py")]
    assert not [word for word in needed if word not in first]


def test_pages_are_short_and_reachable():
    for page, text in PAGES.items():
        assert len(text.splitlines()) < (370 if page == "README.md" else 200), page
        assert page == "README.md" or f"]({page})" in README, f"README has no link to {page}"


def anchors(text):
    """Of every heading, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings_that_exist():
    found = 0
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?://", target):
                continue
            path, _, anchor = target.partition("#")
            file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
            assert file.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(file.read_text()), f"{page}: {target}"
            found += 1
    assert found > 20


def test_files_and_tests_that_are_named_exist():
    named = set(re.findall(r"(?<![\w/.])(?:minillama|recipes|tools|tests)/[\w/]+\.(?:py|sbatch)", EVERYWHERE))
    assert len(named) > 20
    assert not [path for path in named if not (ROOT / path).exists() and path != "tests/test_NAME.py"]


# Flags


@pytest.fixture(scope="module")
def flags():
    """Of every recipe: its --help, without a process for each."""

    def of(recipe):
        spec = importlib.util.spec_from_file_location(f"recipe_{recipe.stem}", recipe)
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # where tyro finds the docstrings
        spec.loader.exec_module(module)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match=r"^0$"):
            tyro.cli(module.Config, args=["--help"])
        return set(re.findall(r"--[a-z][\w.-]*", printed.getvalue()))

    return {recipe.name: of(recipe) for recipe in (ROOT / "recipes").glob("*.py")}


def test_every_flag_named_exists(flags):
    for page in ("docs/from_llama_recipes.md", "docs/from_torchtune.md"):
        cells = [row.split("|")[2] for row in PAGES[page].splitlines() if re.match(r"\| .*\| .*\|", row)]
        named = set(re.findall(r"--[a-z][\w.-]*[a-z]", "\n".join(cells)))
        assert len(named) > 20
        assert not named - set.union(*flags.values()) - {"--group.key", "--nproc_per_node"}, page
    groups = "data|train|eval|optim|fsdp|kernels|checkpoint|log|profile|lora|adapter|dpo"
    named = set(re.findall(rf"--(?:{groups})\.[\w.-]*[a-z]", EVERYWHERE))
    assert len(named) > 40
    assert not named - set.union(*flags.values())
    assert len(COMMANDS) > 10
    for command in COMMANDS:
        recipe = next(Path(word).name for word in command if word.startswith("recipes/"))
        assert not {word for word in command if word.startswith("--")} - flags[recipe] - {"--nproc_per_node"}, command


def test_the_numbers_in_the_table_are_defaults_and_llama_recipes():
    groups = {"lora": LoraConfig(), "adapter": LlamaAdapterConfig()} | vars(RunConfig(Path(), Path()))
    table = PAGES["docs/from_llama_recipes.md"]
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    found = {}
    for theirs, ours in (row.split("|")[1:3] for row in table.splitlines() if row.startswith("| ")):
        stated = {flag: float(value) for flag, value in re.findall(rf"--([a-z][\w.-]*) ({number})(?![\w.])", ours)}
        given = {float(value) for value in re.findall(rf" ({number})(?![\w.])", theirs)}
        assert not given or set(stated.values()) <= given, theirs
        found |= stated
    for flag, value in found.items():
        group, _, name = flag.replace("-", "_").rpartition(".")
        default = getattr(groups[group], name) if group else groups[name]
        assert default == value, flag
    assert len(found) == 21
    assert "--lora.targets " + " ".join(LoraConfig().targets) in table


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", EVERYWHERE, re.M))
    assert len(targets) >= 4
    for target in targets:
        assert re.search(rf"^{''.join(target)}:", makefile, re.M), target


# Snippets, run as they stand


def run_snippet(page, containing):
    [code] = [block for block in blocks(page, "python") if containing in block]
    names = {"__name__": "snippet"}
    exec(compile(code, page, "exec"), names)
    return names


def test_another_attention():
    fork = run_snippet("README.md", "class SlidingWindow")
    model, tokens = random_model(), torch.randint(0, 512, (2, 12))
    base = model(tokens, lengths=[12, 5, 7])
    fork["use_sliding_window"](model)
    assert torch.allclose(model(tokens, lengths=[12, 5, 7]), base, atol=1e-5)  # no document is longer than the window
    fork["SlidingWindow"].window = 3
    q, k, v = torch.randn(2, 12, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
    found = fork["SlidingWindow"]([12, 5, 7], "cpu").attend(q, k, v)
    wide = [x.flatten(0, 1).double().repeat_interleave(4 // x.shape[2], 1) for x in (q, k, v)]
    start = {i: begin for begin, end in ((0, 12), (12, 17), (17, 24)) for i in range(begin, end)}
    for i in range(24):
        keys = slice(max(start[i], i - 2), i + 1)
        scores = torch.einsum("hd,thd->ht", wide[0][i], wide[1][keys]) / 8**0.5
        expected = torch.einsum("ht,thd->hd", scores.softmax(-1), wide[2][keys])
        assert torch.allclose(found.flatten(0, 1)[i].double(), expected, atol=1e-6)
    prompts, answers = ([1, 7, 3, 9, 4, 4, 8], [5, 2]), ([], [])
    for found in stream(model, prompts, max_new_tokens=6):
        for answer, token in zip(answers, found, strict=True):
            answer.append(token)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        for token in answer:  # as the model's own forward attends
            assert token == model(torch.tensor([tokens]))[0, -1].argmax()
            tokens.append(token)
    model.attention = lambda lengths, device: None
    with pytest.raises(UserError, match=r"has no function visible\(queries, keys\)"):
        minillama.generate(model, [1], max_new_tokens=1)


def test_an_adapter_of_ones_own():
    fork = run_snippet("README.md", "class Scaled")
    model, tokens = random_model(), torch.randint(0, 512, (1, 10))
    base = model(tokens)
    fork["apply_ia3"](model)
    assert torch.equal(model(tokens), base)
    model(tokens).sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 9 and all(name.endswith(".scale") for name in trained)


def test_a_loss_of_ones_own():
    fork = run_snippet("README.md", "class ZLossHead")
    model, tokens, labels = random_model(), torch.randint(0, 512, (2, 300)), torch.randint(0, 512, (2, 300))
    labels[:, :20] = -100
    logits = model(tokens)
    total = logits.logsumexp(-1)[labels != -100]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") + 1e-4 * total.square().sum()
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    fork["use_z_loss"](model)
    assert torch.equal(model(tokens), logits)
    loss = model(tokens, labels=labels)
    assert torch.allclose(loss, expected, rtol=1e-6)
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    model(tokens, labels=torch.full_like(labels, -100)).backward()  # no label: 0, with a graph
    assert not any(p.grad.any() for p in model.parameters())


def fork_losses(mesh, folder):
    """Of three steps with all three changes together; sharded where there is a mesh."""
    with torch.device("meta"):
        model = Llama(read_config(folder))
    run_snippet("README.md", "class Scaled")["apply_ia3"](model)
    run_snippet("README.md", "class ZLossHead")["use_z_loss"](model)
    run_snippet("README.md", "class SlidingWindow")["use_sliding_window"](model)
    fsdp = FsdpConfig(strategy="full-shard", precision="fp32", recompute="full")
    set_dtypes(model, fsdp)
    if mesh:
        shard(model, mesh, fsdp)
    materialise(model, "cpu")
    initialise(model, 0, loaded=load_weights(model, folder))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = np.random.default_rng(0).integers(0, 512, 160).astype(np.int32)
    packed = pack(Documents(tokens, np.ones(160, bool), np.arange(0, 161, 20)), 40, 0)
    rank, ranks = (mesh.get_rank(), mesh.size()) if mesh else (0, 1)
    batch = collate(packed, list(range(len(packed)))[rank::ranks], 0, "cpu")
    return [train_step(model, optimizer, [batch])[0].item() for _ in range(3)]


def test_the_changes_together_under_fsdp(tiny_folder):
    alone = fork_losses(None, tiny_folder)
    assert alone[2] < alone[1] < alone[0]
    for losses in run_ranks(fork_losses, 2, tiny_folder):
        assert losses == pytest.approx(alone, rel=1e-6)


def test_training_without_a_recipe_and_asking_the_result(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("models/SmolLM2-135M-Instruct", "Llama-3.1-8B"):
        shutil.copytree(tiny_folder, name)
    [code] = [block for block in blocks("README.md", "python") if "train_step" in block]
    assert len([line for line in code.splitlines() if line]) <= 30
    run_snippet("README.md", "train_step")
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.97 * sum(losses[:5])
    shutil.copytree("out/own/adapter", "out/alpaca/adapter")
    run_snippet("docs/evaluation.md", "load_adapter")
    assert capsys.readouterr().out


def test_a_data_set_of_ones_own(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("poems.txt").write_text("Roses are red\nViolets\n")
    tokenizer = load_tokenizer(tiny_folder)
    dataset, collator = blocks("docs/data.md", "python")
    Path("own.py").write_text(dataset)
    Path("padded.py").write_text(dataset + collator)

    def batch(config):
        train = prepare(config, tokenizer, seed=0, validation=False)[0]
        packed = replace(open_packed(train), collator=load_collator(config, tokenizer))
        return collate(packed, list(range(len(packed))), tokenizer.pad_id, "cpu")

    packs = batch(DataConfig(dataset="own.py"))
    rows = batch(DataConfig(dataset="padded.py", batching="padding"))
    assert packs.tokens.shape == (1, packs.count) and rows.tokens.shape[0] == 2
    # 15 and 9 tokens with BOS and EOS; all but the first of each row are labels
    assert packs.count == rows.count == 24 and packs.trained == rows.trained == 22
