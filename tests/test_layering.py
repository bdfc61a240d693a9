"""Who may import whom: tests -> recipes, tools -> minillama, never back, and heavy libraries only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ONLY_IN = {
    "tyro": {"recipes", "tools"},
    "datasets": {"minillama/datasets.py", "tools"},
    "tiktoken": {"minillama/tokenizer.py"},
    "sentencepiece": {"minillama/tokenizer.py", "minillama/tokenizer_json.py", "tools"},
    "jinja2": {"minillama/template.py"},
    "safetensors": {"minillama/hf.py", "tools"},
    "huggingface_hub": {"minillama/hub.py", "tools"},
    "wandb": {"minillama/metrics.py"},
    "matplotlib": {"minillama/metrics.py", "tools"},
    "gguf": {"tools"},
    "lm_eval": {"minillama/lm_eval.py"},
    "pyarrow": {"minillama/rows.py", "tools"},
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


def test_the_model_needs_torch_alone():
    allowed = {
        "torch",
        "minillama.attention",
        "minillama.autograd",
        "minillama.blockwise",
        "minillama.errors",
        "minillama.loss",
        "minillama.transfer",
        *sys.stdlib_module_names,
    }
    for name in ("model", "attention", "autograd", "blockwise", "loss", "errors", "transfer"):
        names = imports(ROOT / f"minillama/{name}.py")
        assert all(n in allowed or n.partition(".")[0] in allowed for n in names), name


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
import minillama.hub, minillama.metrics, minillama.packing, minillama.tokenizer
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
    import minillama.generate  # the module has the function's name

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
for file in sorted(Path({str(ROOT)!r}).glob("minillama/*.py")):
    if file.stem not in ("__init__", "lm_eval"):  # the latter is the extra "eval"
        importlib.import_module(f"minillama.{{file.stem}}")
for file in sorted([*Path({str(ROOT)!r}).glob("recipes/*.py"), *Path({str(ROOT)!r}).glob("tools/*.py")]):
    sys.path.insert(0, str(file.parent))
    runpy.run_path(str(file), run_name="imported")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")
    assert run.returncode == 0, run.stderr
