"""What the README says exists."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import run_script

from minillama.adapters.llama_adapter import LlamaAdapterConfig
from minillama.adapters.lora import LoraConfig
from minillama.training.config import RunConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```\w*\n(.*?)```", README, re.S)


def test_the_tree_lists_every_file_and_no_other():
    tree = next(block for block in CODE if block.startswith("minillama/"))
    listed, folder = [], ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        elif name.endswith(".py"):
            listed.append(folder + name)
    folders = ("minillama", "minillama/*", "recipes", "tools", "tools/measure")
    there = {str(f.relative_to(ROOT)) for folder in folders for f in ROOT.glob(f"{folder}/*.py")}
    assert sorted(listed) == sorted(name for name in there if not name.endswith("__init__.py"))


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of every training recipe."""
    log = tmp_path_factory.mktemp("help") / "log"

    def of(recipe):
        codes, text = run_script(recipe, "--help", log=log)
        assert codes == [0]
        return set(re.findall(r"--[a-z][\w.-]*", text))

    return {recipe.name: of(recipe) for recipe in (ROOT / "recipes").glob("*_fsdp.py")}


def test_every_flag_it_names_exists(flags):
    table = README.split("## Coming from llama-recipes")[1].split("## The code")[0]
    cells = [row.split("|")[2:] for row in table.splitlines() if row.startswith("| `--")]
    assert len(cells) > 20
    named = set()
    for ours in (cell[0] for cell in cells):
        named |= set(re.findall(r"--[a-z][\w.-]*[a-z]", ours))
    groups = "data|train|eval|optim|fsdp|checkpoint|log|profile|lora|adapter"
    named |= set(re.findall(rf"--(?:{groups})\.[\w.-]*[a-z]", README))
    assert len(named) > 20
    assert not named - set.union(*flags.values())
    lines = "\n".join(CODE).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if re.search(r"recipes/\w+_fsdp.py --", line)]
    assert len(commands) == 6
    for command in commands:
        recipe = next(Path(word).name for word in command if word.startswith("recipes/"))
        assert not {word for word in command if word.startswith("--")} - flags[recipe] - {"--nproc_per_node"}


def test_the_numbers_in_the_table_are_defaults_and_llama_recipes():
    groups = {"lora": LoraConfig(), "adapter": LlamaAdapterConfig()} | vars(RunConfig(Path(), Path()))
    table = README.split("## Coming from llama-recipes")[1].split("## Other formats")[0]
    number = r"-?[\d.]+(?:e-?\d+)?"
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
    assert len(found) == 20
    assert "--lora.targets " + " ".join(LoraConfig().targets) in table


def test_its_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
