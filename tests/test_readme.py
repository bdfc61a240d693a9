"""What the README says exists."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import run_script

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


def test_every_flag_the_recipe_has_for_a_default_of_the_seed_is_stated_truly():
    from dataclasses import asdict

    from minillama.adapters.lora import LoraConfig
    from minillama.training.plan import TrainConfig

    assert "--train.batch-size 4" in README and TrainConfig().batch_size == 4
    assert "--train.epochs 3" in README and TrainConfig().epochs == 3
    lora = asdict(LoraConfig())
    assert "--lora.rank 8 --lora.alpha 32 --lora.dropout 0.05 --lora.targets q_proj v_proj" in README
    assert (lora["rank"], lora["alpha"], lora["dropout"], lora["targets"]) == (8, 32, 0.05, ("q_proj", "v_proj"))


def test_its_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
