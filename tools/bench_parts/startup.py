"""How long minillama takes to start: import, --help, the first step, loading; and to log. Run by tools/bench.py --startup.

    python tools/bench_parts/startup.py cpu|cuda [RESULTS.json]

Processes and reads are warm: each is done once before it is timed, and what is compared takes turns.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from minillama.formats.hf import from_pretrained
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "lora_fsdp.py")
REPEAT = 5
# What minillama uses of torch but `import torch` does not bring
TORCH = "import torch, torch.distributed.fsdp, torch.distributed.tensor, torch.utils.checkpoint"
TIMED = "import time; {before}; began = time.perf_counter(); {timed}; print(time.perf_counter() - began)"


def alternate(measures: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Median of each, in turns."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(REPEAT + 1):
        for name, measure in measures.items():
            value = measure()
            if turn:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def printed(before: str, timed: str) -> float:
    """Seconds that a new Python takes for `timed` after `before`."""
    code = TIMED.format(before=before, timed=timed)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=ENV).stdout)


def wall(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], capture_output=True, check=True, env=ENV)
    return time.perf_counter() - began


def recipe_flags(model: Path, device: str, folder: str, steps: int) -> list[str]:
    flags = ["--model", str(model), "--output-dir", f"{folder}/out", "--device", device]
    flags += ["--eval.no-enabled", "--train.max-steps", str(steps), "--train.batch-size", "1"]
    return [*flags, "--data.cache-dir", f"{folder}/cache", "--data.context-length", "512"]


def first_step(model: Path, device: str) -> float:
    """Seconds from the launch of a recipe to the first line of metrics.jsonl, data tokenized for the first time."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "out" / "metrics.jsonl"
        began = time.perf_counter()
        command, nowhere = [sys.executable, RECIPE, *recipe_flags(model, device, folder, 1)], subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=nowhere, stderr=nowhere, env=ENV)
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        if process.wait():
            raise RuntimeError(f"failed: {' '.join(command)}")
        return seconds


def a_line(model: Path) -> float:
    """Seconds from the end of a step to its line in metrics.jsonl and the progress bar."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", LINES, RECIPE, *recipe_flags(model, "cpu", folder, 30)]
        said = subprocess.run(command, capture_output=True, check=True, text=True, env=ENV).stdout
        return float(said.splitlines()[-1])


LINES = """
import runpy, statistics, sys, time
from minillama.training.metrics import Metrics
step, seconds = Metrics.step, []
def timed(*arguments):
    began = time.perf_counter()
    step(*arguments)
    seconds.append(time.perf_counter() - began)
Metrics.step = timed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(statistics.median(seconds))
"""


def make_folder(folder: Path, config: LlamaConfig) -> Path:
    """A model of random weights, with a tokenizer of 256 bytes and 256 special tokens."""
    model = Llama(config).to(torch.bfloat16)
    save_file(dict(model.named_parameters()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]} | asdict(config)))
    lines = [f"{b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


def read_reusing(file: Path) -> float:
    """Into one small buffer: no memory is taken."""
    buffer = bytearray(2**24)
    began = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass
    return time.perf_counter() - began


def read_whole(file: Path) -> float:
    began = time.perf_counter()
    file.read_bytes()
    return time.perf_counter() - began


def load(folder: Path, device: str) -> float:
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        from_pretrained(folder, device=device, dtype=torch.bfloat16)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(device: str, results: Path | None) -> None:
    small = LlamaConfig(512, 64, 128, 2, 4, 2, rms_norm_eps=1e-5, tie_word_embeddings=True)
    large = LlamaConfig(32000, 2048, 8192, 15, 32, 8, rms_norm_eps=1e-5, tie_word_embeddings=True)
    found = alternate(
        {
            "import torch": lambda: printed("pass", "import torch"),
            "import minillama after torch": lambda: printed("import torch", "import minillama"),
            "import minillama after torch and its fsdp": lambda: printed(TORCH, "import minillama"),
            "python -c 'import torch'": lambda: wall("-c", "import torch"),
            "lora_fsdp.py --help": lambda: wall(RECIPE, "--help"),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_folder(Path(folder), small)
        found |= alternate({"lora_fsdp.py to its first step": lambda: first_step(tiny, device)})
        line = a_line(tiny)
    with tempfile.TemporaryDirectory() as folder:
        file = make_folder(Path(folder), large) / "model.safetensors"
        gigabytes = file.stat().st_size / 1e9
        seconds = alternate(
            {
                "read into one buffer": lambda: read_reusing(file),
                "read whole": lambda: read_whole(file),
                "from_pretrained": lambda: load(file.parent, device),
            }
        )
    rates = {name: gigabytes / value for name, value in seconds.items()}

    for name, value in found.items():
        print(f"{name:44} {value:6.2f} s  {value / found['import torch']:5.2f} x import torch")
    print(f"{'a line of metrics.jsonl':44} {1e3 * line:6.2f} ms")
    for name, value in rates.items():
        share = (
            "" if name == "from_pretrained" else f"  from_pretrained is {rates['from_pretrained'] / value:.2f} of it"
        )
        print(f"{name + f', {gigabytes:.2f} GB':44} {value:6.2f} GB/s{share}")
    if results:
        results.write_text(
            json.dumps(
                {"seconds": found | {"a line of metrics.jsonl": line}, "gb_per_s": rates, "gigabytes": gigabytes},
                indent=1,
            )
            + "\n"
        )


ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if sys.argv[2:] and sys.argv[2] else None)
