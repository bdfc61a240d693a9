"""Who may import whom: tests -> recipes, tools -> minillama, never back, and heavy libraries only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "model",
    "parallel",
    "files",
    "progress",
    "tokenizer",
    "formats",
    "hardware",
    "data",
    "training",
    "adapters",
    "inference",
)
"""In order: each may import those before it, and minillama.errors. files and progress are modules of their own."""
ONLY_IN = {
    "tyro": {"recipes", "tools"},
    "datasets": {"minillama/data/datasets.py", "tools"},
    "tiktoken": {"minillama/tokenizer/engines.py"},
    "sentencepiece": {*(f"minillama/tokenizer/{name}.py" for name in ("engines", "export", "tokenizer")), "tools"},
    "jinja2": {"minillama/tokenizer/template.py"},
    "safetensors": {"minillama/formats/hf.py", "minillama/formats/hf_export.py", "tools"},
    "huggingface_hub": {"minillama/formats/hub.py", "tools"},
    "tqdm": {"minillama/progress.py"},
    "wandb": {"minillama/training/metrics.py"},
    "matplotlib": {"minillama/training/metrics.py", "tools"},
    "gguf": {"tools"},
    "lm_eval": {"minillama/inference/lm_eval.py"},
    "pyarrow": {"minillama/data/rows.py", "tools"},
    "transformers": {"tools"},
    "peft": {"tools"},
    "torchtune": {"tools"},
}


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
    return names


def sources():
    files = [f for folder in ("minillama", "recipes", "tools") for f in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 20
    return [(f.relative_to(ROOT), imports(f)) for f in files]


def test_layers():
    recipes_and_tools = {f.stem for folder in ("recipes", "tools") for f in (ROOT / folder).glob("*.py")}
    for file, names in sources():
        tops = {name.partition(".")[0] for name in names}
        assert not tops & {"tests", "recipes", "tools"}, file
        if file.parts[0] != "minillama":
            # a script's own folder is on its path, so a sibling would import by its bare name
            assert not tops & (recipes_and_tools - {"generate", "evaluate"}), file
        for library, places in ONLY_IN.items():
            if library in tops:
                assert file.parts[0] in places or str(file) in places, f"{file} imports {library}"


def package_of(module: str) -> str:
    """minillama.model.loss -> model; minillama.files -> files."""
    return module.removeprefix("minillama.").partition(".")[0]


def test_packages_import_those_before_them_alone():
    """Every import counts, those for types too."""
    for file, names in sources():
        if file.parts[0] != "minillama" or file.name == "__init__.py":
            continue
        own = package_of(".".join(file.with_suffix("").parts))
        allowed = {"errors"} if own != "errors" else set()
        if own in PACKAGES:
            allowed |= {*PACKAGES[: PACKAGES.index(own) + 1]}
        found = {package_of(name) for name in names if name.startswith("minillama")}
        assert found <= allowed, f"{file} imports {found - allowed}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        ".".join(file.with_suffix("").parts): {name for name in names if name.startswith("minillama.")}
        for file, names in sources()
        if file.parts[0] == "minillama" and file.name != "__init__.py"
    }
    waiting = dict(graph)
    while free := [module for module, names in waiting.items() if not names & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, f"circles among {', '.join(waiting)}"


def test_the_model_needs_torch_alone():
    allowed = {"torch", "minillama", *sys.stdlib_module_names}
    for file in ("errors.py", *(f"model/{name.name}" for name in (ROOT / "minillama/model").glob("*.py"))):
        names = imports(ROOT / "minillama" / file)
        assert {name.partition(".")[0] for name in names} <= allowed, file


def test_importing_the_library_does_nothing_and_imports_nothing_heavy():
    code = """
import os, sys, logging
before = dict(os.environ), logging.root.handlers[:]
heavy = {"transformers", "datasets", "matplotlib", "wandb", "tensorboard", "tiktoken", "sentencepiece", "jinja2", "tyro"}
heavy |= {"pyarrow", "huggingface_hub"}
for name in heavy | {"safetensors", "tqdm"}:
    sys.modules[name] = None  # importing it fails
import minillama.model, minillama
assert callable(minillama.Llama) and callable(minillama.apply_lora) and callable(minillama.generate)
del sys.modules["safetensors"], sys.modules["tqdm"]
import minillama.formats.hub, minillama.training.metrics, minillama.data.packing, minillama.tokenizer.tokenizer
assert (dict(os.environ), logging.root.handlers) == before
import torch
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT / "tests"
    )
    assert run.returncode == 0, run.stderr


def test_public_names_are_those_of_the_contract():
    import minillama

    contract = {"Llama", "LlamaConfig", "LoraConfig", "apply_lora", "from_pretrained", "generate", "load_adapter"}
    contract |= {
        "LlamaAdapterConfig",
        "apply_llama_adapter",
        "load_tokenizer",
        "load_weights",
        "merge_lora",
        "replace_modules",
        "save_adapter",
        "save_pretrained",
        "shard",
        "train_step",
    }
    assert contract <= set(minillama.__all__)
    assert all(callable(getattr(minillama, name)) for name in minillama.__all__)


def test_modules_and_tools_need_only_what_is_declared():
    """Each is imported where nothing is but the dependencies, with what they bring along, and not tyro's old rich."""
    declared = {"torch", "numpy", "safetensors", "sentencepiece", "tiktoken", "jinja2", "tqdm", "tyro", "minillama"}
    code = f"""
import importlib.abc, re, runpy, sys
from importlib.metadata import distribution, packages_distributions, requires
from pathlib import Path
name_of = lambda text: re.match(r"[\\w.-]+", text)[0].lower().replace("_", "-")
needed, waiting = set(), list({declared!r})
while waiting:
    if (name := waiting.pop()) in needed:
        continue
    needed.add(name)
    try:
        waiting += [name_of(one) for one in requires(name) or () if "extra ==" not in one]
    except importlib.metadata.PackageNotFoundError:
        pass  # of another system
needed.discard("rich")
others = {{p for p, names in packages_distributions().items() if not needed & {{name_of(n) for n in names}}}}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in others:
            raise ModuleNotFoundError(f"{{name}} is not declared", name=name)
sys.meta_path.insert(0, Absent())
assert "transformers" in others and "rich" in others and "torch" not in others
for file in sorted(Path({str(ROOT)!r}).glob("minillama/**/*.py")):
    if file.stem not in ("__init__", "lm_eval"):  # the latter is the extra "eval"
        importlib.import_module(".".join(file.relative_to({str(ROOT)!r}).with_suffix("").parts))
for file in sorted(f for d in ("recipes", "tools", "tools/measure") for f in (Path({str(ROOT)!r}) / d).glob("*.py")):
    sys.path.insert(0, str(file.parent))
    runpy.run_path(str(file), run_name="imported")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")
    assert run.returncode == 0, run.stderr
