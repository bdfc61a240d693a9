"""What a run writes while it trains: run.json, metrics.jsonl, loss.png, and the loggers asked for."""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from minillama.distributed import all_reduce, on_rank_zero, rank
from minillama.errors import UserError
from minillama.model import Llama
from minillama.packing import Batch, Packed
from minillama.profiling import MFU_FORMULA, count_parameters, matmul_rate, peak_memory_gib, step_flops

Config = TypeVar("Config")


@dataclass(frozen=True)
class LogConfig:
    """Where the numbers go, besides metrics.jsonl."""

    every: int = 1
    """Steps between lines of metrics.jsonl. Loss, counts and speed are those of all steps since the last line, lr and
    grad_norm those of the last step."""
    tensorboard: bool = False
    """Also write TensorBoard files to OUTPUT_DIR/tensorboard (needs minillama[tensorboard])."""
    wandb: bool = False
    """Also log to Weights & Biases, set up by its own environment variables (needs minillama[wandb])."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"--log.every {self.every}: must be at least 1")
        for name in ("tensorboard", "wandb"):
            if getattr(self, name) and find_spec(name) is None:
                raise UserError(f'--log.{name} needs the package: pip install "minillama[{name}]"')


def start_run(output_dir: Path, flags: Any) -> None:
    """Makes the output folder and writes run.json: the resolved flags and what they run on. Every rank must call it.

    Raises UserError if the folder cannot be written, or holds an earlier run that got as far as a training step.
    """

    def write() -> None:
        metrics = output_dir / "metrics.jsonl"
        if (output_dir / "adapter").exists() or (metrics.exists() and '"loss"' in metrics.read_text()):
            raise UserError(f"{output_dir} already holds a run: give another --output-dir, or remove that folder")
        run = {
            "command": sys.argv,
            "flags": asdict(flags),
            "world_size": dist.get_world_size(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "minillama": version("minillama"),
            },
            "git_commit": _git_commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            (output_dir / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")
        except OSError as error:
            raise UserError(f"--output-dir {output_dir} cannot be written: {error.strerror}") from None

    on_rank_zero(write)


def saved_flags(config_class: type[Config]) -> Config | None:
    """The flags of the run.json that --config names on the command line, to be the defaults of this run; None without.

    Raises UserError if the file is not a run.json, or one of another recipe.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, nargs="?")  # without a value: the real parser says so
    file = parser.parse_known_args()[0].config
    if file is None:
        return None

    def flag(where: str, name: str) -> str:
        return (where + name).replace("_", "-")

    def build(kind: Any, values: dict[str, Any], where: str) -> Any:
        hints = get_type_hints(kind)
        if unknown := values.keys() - hints.keys():
            raise UserError(f"--config {file}: this recipe has no flag --{flag(where, sorted(unknown)[0])}")
        read = {}
        for name, value in values.items():
            hint = hints[name]
            allowed = get_args(hint) or (hint,)
            if is_dataclass(hint):
                read[name] = build(hint, value, f"{name}.")
            elif value is None and type(None) in allowed:
                read[name] = None
            elif Path in allowed and isinstance(value, str):
                read[name] = Path(value)
            elif get_origin(hint) is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
                read[name] = tuple(value)
            elif value in allowed or type(value) in allowed or (float in allowed and type(value) is int):
                read[name] = value
            else:
                raise UserError(f"--config {file}: {json.dumps(value)} is not a value of --{flag(where, name)}")
        return kind(**read)

    try:
        return build(config_class, json.loads(file.read_text())["flags"], "")
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--config {file} is not the run.json of a run ({error!r})") from None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Metrics:
    """Collects what each step did, and every `--log.every` steps makes one line of it, of all ranks together."""

    def __init__(
        self, output_dir: Path, config: LogConfig, flags: Any, model: Llama, device: str, dtype: torch.dtype, steps: int
    ) -> None:
        self.config, self.model, self.device = config, model, device
        self.rate = matmul_rate(device, dtype)
        self.file = (output_dir / "metrics.jsonl").open("w") if rank() == 0 else None
        self.bar = tqdm(total=steps, desc="training", unit="step", disable=rank() != 0)
        self.tensorboard = self.wandb = None
        if rank() == 0 and config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(output_dir / "tensorboard"))
        if rank() == 0 and config.wandb:
            import wandb

            self.wandb = wandb.init(project="minillama", dir=str(output_dir), config=asdict(flags))
        self._reset()

    def _reset(self) -> None:
        self.loss_sum: Tensor | float = 0.0  # this rank's part: each step's loss times this rank's trained tokens
        self.counts = [0, 0, 0]  # this rank's tokens, trained tokens and squares since the last line
        self.waited = 0.0
        self.started = time.perf_counter()

    def step(
        self, number: int, epoch: float, lr: float, loss: Tensor, norm: Tensor, batches: list[Batch], waited: float
    ) -> None:
        """Notes step `number`, counted from 1; waited: seconds this rank waited for its batches."""
        self.loss_sum = self.loss_sum + loss * float(sum(batch.trained for batch in batches))
        for batch in batches:
            for i, count in enumerate((batch.count, batch.trained, batch.squares)):
                self.counts[i] += count
        self.waited += waited
        self.bar.update()
        if number % self.config.every and number != self.bar.total:
            return
        loss_sum, grad_norm = float(self.loss_sum), norm.item()  # waits for the device
        seconds = time.perf_counter() - self.started
        flops = step_flops(self.model, *self.counts)
        tokens, trained, flops, rate, loss_sum = all_reduce([*self.counts[:2], flops, self.rate, loss_sum])
        mean_loss = loss_sum / max(1, trained)
        memory, waited, seconds = all_reduce([peak_memory_gib(self.device), self.waited, seconds], "max")
        self.bar.set_postfix(loss=f"{mean_loss:.4f}", tokens_per_s=f"{tokens / seconds:.0f}")
        self._write(
            {
                "step": number,
                "epoch": round(epoch, 4),
                "loss": mean_loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": int(tokens),
                "trained_tokens": int(trained),
                "tokens_per_s": round(tokens / seconds, 1),
                "tflops": round(flops / seconds / 1e12, 4),
                "mfu": round(flops / seconds / rate, 4),
                "peak_memory_gib": round(memory, 3),
                "data_wait_s": round(waited, 4),
            }
        )
        if not math.isfinite(mean_loss) or not math.isfinite(grad_norm):
            self.close()
            raise UserError(
                f"step {number}: the loss is {mean_loss}, the gradient's norm {grad_norm}: training has diverged; "
                "try a lower --optim.lr, --optim.warmup-steps or --train.clip-norm"
            )
        self._reset()

    def evaluation(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Notes the loss on the validation set after `step` steps: mean nats a trained token over `tokens` of them.

        seconds: what the evaluation took, which does not count for the speed of the steps around it.
        """
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()  # inf, not an error, where it is too large
        self._write({"step": step, "eval_loss": loss, "eval_perplexity": perplexity, "eval_tokens": tokens})
        if rank() == 0:
            self.bar.write(f"step {step}: validation loss {loss:.4f}, perplexity {perplexity:.3f} ({tokens} tokens)")
        self.started += seconds

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is None:
            return
        line = {key: value if math.isfinite(value) else None for key, value in line.items()}  # JSON has no NaN
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        values = {key: value for key, value in line.items() if key != "step" and value is not None}
        if self.tensorboard is not None:
            for key, value in values.items():
                self.tensorboard.add_scalar(key, value, line["step"])
        if self.wandb is not None:
            self.wandb.log(values, step=line["step"])

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def summary(
    model: Llama,
    train: Packed,
    validation: Packed | None,
    steps: int,
    precision: str,
    mesh: DeviceMesh,
    output_dir: Path,
) -> str:
    """What a run is about to do, in a few lines."""
    total, trainable = count_parameters(model)
    lines = [
        f"model       {total:,} parameters, {trainable:,} of them trained ({trainable / total:.3%})",
        f"processes   {mesh.size()} on {mesh.device_type}, precision {precision}",
    ]
    for name, packed in (("training", train), ("validation", validation)):
        if packed is None:
            lines.append(f"{name:11} none")
            continue
        documents_, documents = packed.documents, len(packed.documents)
        dropped = f"; {packed.dropped} longer than that DROPPED" if packed.dropped else ""
        if (
            longest := max(documents_.lengths[i] for p in packed.packs for i in p)
        ) > model.config.max_position_embeddings:
            dropped += (
                f"; the longest, {longest}, BEYOND the {model.config.max_position_embeddings} the model was made for"
            )
        lines.append(
            f"{name:11} {documents - packed.dropped} rows, {packed.tokens:,} tokens, {len(packed.packs)} packs of "
            f"{packed.context_length} ({packed.efficiency:.1%} full){dropped}"
        )
    lines.append(f"steps       {steps}")
    lines.append(f"output      {output_dir}")
    lines.append(f"mfu         {MFU_FORMULA}")
    return "\n".join(lines)


def read_metrics(file: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The lines of metrics.jsonl: (those of steps, those of evaluations). Raises UserError for one that is cut off."""
    lines = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            raise UserError(
                f"{file}, line {number} is not JSON: was the run that wrote it killed? drop the line"
            ) from None
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def plot_loss(metrics_file: Path, image: Path) -> bool:
    """Draws training and validation loss over the steps. Returns False, drawing nothing, without matplotlib."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    trained, evaluated = read_metrics(metrics_file)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([m["step"] for m in trained], [m["loss"] for m in trained], lw=1, label="training")
    if evaluated:
        axes.plot([m["step"] for m in evaluated], [m["eval_loss"] for m in evaluated], "o-", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)
    return True
