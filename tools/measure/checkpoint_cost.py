"""How long a step waits for a checkpoint, written at once or beside the training; one process, random weights.

    python tools/measure/checkpoint_cost.py --folder /tmp/cost              a 2 GB state: all weights, with AdamW's moments
    python tools/measure/checkpoint_cost.py --folder /tmp/cost --layers 400 20 GB

Prints one table. The files are removed again.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from minillama.data.batch import Batch
from minillama.files import check_unused
from minillama.help import filled
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.parallel.failures import user_errors
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.processes import Device, process_group
from minillama.parallel.sharding import FsdpConfig, make_mesh, set_dtypes, shard
from minillama.training.checkpoint import CheckpointConfig, Checkpoints
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.plan import Progress
from minillama.training.step import train_step


@dataclass(frozen=True)
class Cost:
    """Stall of a step by a checkpoint."""

    folder: Path
    """A new folder, on the disk that is to be measured"""
    layers: int = 47
    """Layers of 4 million weights, 48 MB of state each"""
    saves: int = 4
    """Checkpoints of each kind; the first fills the buffers and is reported separately"""
    device: Device = "auto"


def measure(cost: Cost) -> None:
    check_unused(cost.folder)  # whose checkpoints are removed
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    fsdp = FsdpConfig(strategy="full-shard", precision="mixed")
    with process_group(cost.device) as device:
        with torch.device("meta"):
            model = Llama(LlamaConfig(vocab_size=512, num_hidden_layers=cost.layers, **shape))
        set_dtypes(model, fsdp)
        shard(model, make_mesh(fsdp, device), fsdp)
        materialise(model, device)
        initialise(model, 0)
        optimizer = make_optimizer(model.parameters(), OptimConfig())
        tokens = torch.randint(512, (1, 256), device=device)
        positions = torch.arange(256, device=device)[None]
        batch = Batch(tokens, positions, tokens.cpu(), torch.zeros(1, 256, dtype=torch.int64), 256, 256, 256**2)
        state = 3 * sum(p.numel() * p.element_size() for p in model.parameters())

        def timed(action) -> float:
            started = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        def step() -> None:
            train_step(model, optimizer, [batch])

        alone = min(timed(step) for _ in range(4))
        print(f"{state / 1e9:.2f} GB on {device}; a step alone: {alone:.2f} s")
        stalls = {}
        for asynchronous in (False, True):
            kind = CheckpointConfig(keep=1, async_save=asynchronous)
            stall, beside, written = [], [], []
            about = {"flags": {}, "fingerprints": {}}
            with Checkpoints(
                cost.folder, kind, model, optimizer, None, device, packs_per_step=1, about=about
            ) as checkpoints:
                for number in range(1, cost.saves + 1):
                    begun = time.perf_counter()
                    stall.append(timed(lambda n=number: checkpoints.save(Progress(packs_per_step=1, step=n))))
                    beside.append(timed(step))
                    checkpoints.finish()
                    written.append(time.perf_counter() - begun)
            shutil.rmtree(cost.folder / "checkpoints")
            stalls[asynchronous] = min(stall[1:])
            print(
                f"{'async' if asynchronous else 'sync ':5}  stall {stall[0]:.2f} s, then {min(stall[1:]):.2f} to "
                f"{max(stall[1:]):.2f} s; next step {min(beside[1:]):.2f} s; on the disk after {min(written[1:]):.2f} s"
            )
        print(f"async stall / sync stall: {stalls[True] / stalls[False]:.3f}")


if __name__ == "__main__":
    with user_errors():
        measure(tyro.cli(filled(Cost)))
