"""How much host memory loading takes on top of the model itself, measured on a random checkpoint.

    torchrun --nproc_per_node 2 tools/measure/loading_memory.py --folder /tmp/big

Each rank prints its anonymous memory (RssAnon of /proc/self/status, which leaves out the mapped files) before loading,
at the peak, and the size of its own shards. Linux, CPU.
"""

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from safetensors.torch import save_file

from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.files import check_unused
from minillama.formats.hf import check_weights, load_weights, read_config
from minillama.formats.quantized import Quantize, quantize_base
from minillama.help import filled
from minillama.model.llama import Llama
from minillama.parallel.failures import user_errors
from minillama.parallel.initialise import materialise
from minillama.parallel.processes import on_rank_zero, process_group, quiet_but_on_rank_zero, rank, say
from minillama.parallel.sharding import FsdpConfig, local, make_mesh, set_dtypes, shard

SHAPE = {  # Llama 3.2 1B's, in bf16: 2.3 GiB
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Args:
    """Host memory that loading takes on top of the model."""

    folder: Path
    """Where to make the checkpoint; one that an earlier call made is used again."""
    quantize: Quantize = "none"
    """Hold the linear layers of the blocks in 4 bits a weight (nf4) or 8 (int8)."""


def make_checkpoint(folder: Path) -> None:
    """Random weights in Hugging Face's format, one file a layer."""
    check_unused(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    with torch.device("meta"):
        model = Llama(read_config(folder))
    files: dict[str, str] = {}
    for name in dict(model.named_parameters()):
        layer = name.split(".")[2] if ".layers." in name else "ends"
        files[name] = f"model-{layer}.safetensors"
    for file in set(files.values()):
        shapes = {n: p.shape for n, p in model.named_parameters() if files[n] == file}
        save_file({n: torch.randn(s, dtype=torch.bfloat16) for n, s in shapes.items()}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def anonymous_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def main(args: Args) -> None:
    with process_group("cpu") as device:
        if not on_rank_zero(lambda: (args.folder / "model.safetensors.index.json").exists()):
            on_rank_zero(lambda: make_checkpoint(args.folder))
        with torch.device("meta"):
            model = Llama(read_config(args.folder)).requires_grad_(False)
        quantize_base(model, check_weights(model, args.folder), args.quantize)
        apply_lora(model, LoraConfig())
        fsdp = FsdpConfig(strategy="full-shard", precision="mixed")
        mesh = make_mesh(fsdp, device)
        set_dtypes(model, fsdp)
        shard(model, mesh, fsdp)

        before = peak = anonymous_mib()
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, anonymous_mib())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        materialise(model, "cpu")
        load_weights(model, args.folder)
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()

        shards = sum(local(p).numel() * p.element_size() for p in model.parameters()) / 2**20
        size = sum(f.stat().st_size for f in args.folder.glob("*.safetensors")) / 2**30
        say(f"checkpoint {size:.2f} GiB, {mesh.size()} ranks, loaded in {seconds:.1f} s")
        for turn in range(mesh.size()):
            dist.barrier()
            if turn == rank():
                print(
                    f"rank {turn}: RssAnon {before:.0f} MiB before, {peak:.0f} at the peak; its shards {shards:.0f}; "
                    f"on top of them {peak - before - shards:.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    with user_errors():
        with quiet_but_on_rank_zero():
            args = tyro.cli(filled(Args))
        main(args)
