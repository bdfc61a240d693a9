"""What converting and merging cost, compared with a plain copy: time, and the peak of anonymous memory.

    python tools/measure/conversion_cost.py --folder /tmp/convert    4 GB of random bf16 weights, some 20 GB of disk

Makes a model with Llama 3.2 3B's width and vocabulary, a LoRA for it and a checkpoint of all its weights, and runs
tools/convert_checkpoint.py and tools/merge_lora.py on them as a user would, from start-up to exit. Linux. The files are
removed again.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file

from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.adapters.peft import peft_config, peft_name, write_adapter
from minillama.files import check_unused
from minillama.formats.hf import adapter_parameters, from_pretrained, read_config, weights_fingerprint
from minillama.help import filled
from minillama.model.llama import Llama
from minillama.parallel.failures import user_errors
from minillama.parallel.processes import process_group
from minillama.training.checkpoint import CheckpointConfig, Checkpoints
from minillama.training.plan import Progress

TOOLS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Cost:
    """What converting and merging cost."""

    folder: Path
    """A new folder, on the disk that is to be measured"""
    layers: int = 16
    """Layers of 100 million weights, 0.2 GB each"""
    rounds: int = 2
    """Repetitions; the fastest counts"""


def make_base(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072}
    config |= {"intermediate_size": 8192, "num_hidden_layers": layers, "num_attention_heads": 24}
    config |= {"num_key_value_heads": 8, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llama(read_config(folder))
    where = {
        n: f"model-{n.split('.')[2] if '.layers.' in n else 'ends'}.safetensors" for n, _ in model.named_parameters()
    }
    for file in set(where.values()):
        inside = {n: p for n, p in model.named_parameters() if where[n] == file}
        save_file({n: torch.randn(p.shape).bfloat16() for n, p in inside.items()}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def make_adapter(base: Path, folder: Path) -> None:
    config = LoraConfig(targets=("all-linear",), dora=True)
    with torch.device("meta"):
        model = apply_lora(Llama(read_config(base)), config)
    tensors = {peft_name(name): torch.rand(p.shape) + 0.5 for name, p in adapter_parameters(model).items()}
    write_adapter(folder, peft_config(config, str(base), model.config.num_hidden_layers), tensors)


def make_checkpoint(base: Path, folder: Path) -> Path:
    """A checkpoint of all weights without optimizer, as full_fsdp.py writes it."""
    kind = CheckpointConfig(save_optimizer=False, async_save=False)
    flags = {"model": str(base.resolve()), "tokenizer": None, "train": {"batch_size": 1, "accumulate": 1}}
    about = {"flags": flags, "fingerprints": {"model": weights_fingerprint(base), "data": ""}}
    with process_group("cpu") as device:
        model = from_pretrained(base).requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters())
        with Checkpoints(folder, kind, model, optimizer, None, device, packs_per_step=1, about=about) as checkpoints:
            checkpoints.save(Progress(packs_per_step=1, step=1))
    return folder / "checkpoints" / "step-00000001"


def measured(command: list[str]) -> tuple[float, float]:
    """(seconds, most anonymous memory in MB) of a process."""
    os.sync()
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.005)
    if process.wait():
        raise SystemExit(process.stderr.read() if process.stderr else "")
    return time.perf_counter() - started, peak * 1024 / 1e6


def main(cost: Cost) -> None:
    check_unused(cost.folder)  # which is removed at the end
    base, adapter = cost.folder / "base", cost.folder / "adapter"
    make_base(base, cost.layers)
    make_adapter(base, adapter)
    checkpoint = make_checkpoint(base, cost.folder / "run")
    size = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e9
    print(f"{size:.2f} GB of bf16 weights; seconds from start-up to exit, of a plain copy of these files too")
    convert, target = [sys.executable, str(TOOLS / "convert_checkpoint.py")], cost.folder / "target"
    merge = [sys.executable, str(TOOLS / "merge_lora.py")]
    meta = cost.folder / "meta"
    subprocess.run([*convert, str(base), str(meta)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = {
        "Hugging Face -> Meta": [*convert, str(base), str(target)],
        "Meta -> Hugging Face": [*convert, str(meta), str(target)],
        "checkpoint -> Hugging Face": [*convert, str(checkpoint), str(target)],
        "base + DoRA, all-linear": [*merge, str(base), str(adapter), str(target)],
    }
    for what, command in rows.items():
        ours, plain, memory = [], [], 0.0
        for _ in range(cost.rounds):
            plain.append(measured(["cp", "-r", str(base), str(target)])[0])
            shutil.rmtree(target)
            seconds, peak = measured(command)
            ours.append(seconds)
            memory = max(memory, peak)
            shutil.rmtree(target)
        print(
            f"{what:27} {min(ours):5.1f} s, copy {min(plain):5.1f} s, ratio {min(ours) / min(plain):.2f}; "
            f"{memory:.0f} MB anonymous",
            flush=True,
        )
    shutil.rmtree(cost.folder)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(filled(Cost)))
