"""What a run writes while it trains: metrics.jsonl, loss.png, and the loggers asked for."""

import io
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from minillama.data.batch import Batch
from minillama.errors import UserError, disk_text
from minillama.files import misfit, read_bytes, write_whole
from minillama.hardware.benchmark import matmul_rate
from minillama.model.llama import Llama
from minillama.parallel.memory import peak_memory_gib
from minillama.parallel.processes import all_reduce, rank
from minillama.progress import progress
from minillama.training.flops import step_flops
from minillama.training.plan import Progress, Step
from minillama.training.step import CrossEntropy, Loss


@dataclass(frozen=True)
class LogConfig:
    """Where numbers are logged, besides metrics.jsonl."""

    every: int = 1
    """Steps between lines of metrics.jsonl. Loss, counts and speed are those of all steps since the last line, lr and
    grad_norm those of the last step. mfu is the FLOPs needed, without recomputation, / seconds / (processes x the FLOP/s
    of matrix products, measured at the start)."""
    tensorboard: bool = False
    """Also write TensorBoard files to OUTPUT_DIR/tensorboard (needs the package tensorboard)."""
    wandb: bool = False
    """Also log to Weights & Biases, set up by its own environment variables (needs the package wandb)."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"--log.every {self.every}: must be at least 1")
        for name in ("tensorboard", "wandb"):
            if getattr(self, name) and find_spec(name) is None:
                raise UserError(f"--log.{name} needs a package: pip install {name}")


PLOTTED = {"loss": "loss", "reward_margin": "reward margin", "accuracy": "accuracy"}
"""What loss.png shows, one below the other: the last two of pairs of answers"""


class Metrics:
    """Collects the numbers of each step, and writes a line for all ranks together every `--log.every` steps."""

    def __init__(
        self,
        output_dir: Path,
        config: LogConfig,
        model: Llama,
        device: str,
        dtype: torch.dtype,
        steps: int,
        start: Progress,
        loss_function: Loss | None = None,
    ) -> None:
        """dtype: what the model computes in; steps: how many the run makes in all."""
        self.loss_function = loss_function or CrossEntropy()
        self.every, self.model, self.device, self.dtype = config.every, model, device, dtype
        self.rate = matmul_rate(device, dtype)
        self.tokens = start.tokens - int(start.unlogged[2])  # of all lines so far
        self.trained = start.step > 0  # whether any token has been trained on
        self.evaluated: dict[int, float] = {}  # step -> loss
        self.file = _reopen(output_dir / "metrics.jsonl", start) if rank() == 0 else None
        form = "{desc} {n_fmt}/{total_fmt}{postfix} |{bar}| {elapsed}<{remaining}"  # a narrow terminal cuts the end
        self.bar = progress(total=steps, initial=start.step, desc="step", bar_format=form, leave=True)
        self.tensorboard = self.wandb = None
        if rank() == 0 and config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start.step + 1)
        if rank() == 0 and config.wandb:
            import wandb

            run = json.loads((output_dir / "run.json").read_text())
            self.wandb = wandb.init(
                project="minillama", dir=str(output_dir), config=run["flags"], id=run["id"], resume="allow"
            )
        self._reset(*(start.unlogged if rank() == 0 else ()))

    def _reset(self, loss_sum: float = 0.0, seconds: float = 0.0, *counts: float) -> None:
        # this rank's since the last line: each step's loss times its trained tokens; tokens, trained tokens and squares;
        # what the loss has added up
        self.loss_sum: Tensor | float = loss_sum
        self.counts = [int(count) for count in counts[:3]] or [0, 0, 0]
        sums = self.loss_function.sums
        sums.copy_(torch.tensor(counts[3:] or [0.0] * len(sums), dtype=sums.dtype))
        self.seconds = seconds
        self.waited = 0.0
        self.started: float | None = None  # the clock

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        started = time.perf_counter()
        if self.started is None:
            self.started = started
        yield
        self.waited += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what does not count as time of a step."""
        started = time.perf_counter()
        yield
        if self.started is not None:
            self.started += time.perf_counter() - started

    def _clock(self) -> float:
        return self.seconds + (time.perf_counter() - self.started if self.started is not None else 0)

    def step(self, step: Step, lr: float, loss: Tensor, norm: Tensor, batches: list[Batch]) -> None:
        """Records a step: its learning rate, what train_step returned, this rank's micro-batches.

        Raises UserError, where it makes a line, if training has diverged.
        """
        # exact in fp64, as losses have 24 bits: the sum does not depend on where a run was interrupted
        self.loss_sum = self.loss_sum + loss.double() * sum(map(self.loss_function.count, batches))
        self.norm = norm
        for batch in batches:
            for i, count in enumerate((batch.count, batch.trained, batch.squares)):
                self.counts[i] += count
        self.bar.update()
        if (step.number + 1) % self.every and not step.is_last:
            return
        number, seconds = step.number + 1, self._clock()
        loss_sum, grad_norm = float(self.loss_sum), norm.item()  # waits for the device
        flops = step_flops(self.model, *self.counts)
        tokens, trained, flops, rate, loss_sum = all_reduce([*self.counts[:2], flops, self.rate, loss_sum])
        self.trained = self.trained or trained > 0
        if not self.trained:  # only a user's own collator can do that
            self.close()
            raise UserError(
                f"step {number}: none of its {tokens:.0f} tokens is trained: correct your collator's labels"
            )
        told = means_told(self.loss_function)
        mean_loss = loss_sum / max(1, *list(told.values())[:1] or [trained])
        self.tokens += int(tokens)
        memory, waited, seconds = all_reduce([peak_memory_gib(self.device), self.waited, seconds], "max")
        self.bar.set_postfix_str(f"loss {mean_loss:.4f}, {tokens / seconds:.0f} tokens/s")
        self._write(
            {
                "step": number,
                "epoch": round(step.progress, 4),
                "loss": mean_loss,
                **told,
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
        if self.dtype == torch.float16 and math.isfinite(mean_loss) and not math.isfinite(grad_norm):
            self.say(f"step {number}: a gradient overflowed in fp16; the step is skipped and the loss scale halved")
        self._check(number, mean_loss, grad_norm)
        self._reset()

    def _check(self, number: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self.dtype == torch.float16):
            return
        self.close()
        raise UserError(
            f"step {number}: the loss is {loss}, the gradient's norm {grad_norm}: training has diverged; try a lower "
            "--optim.lr, --optim.warmup-steps or --train.clip-norm"
        )

    def so_far(self, number: int) -> tuple[int, list[float]]:
        """(Tokens trained on, Progress.unlogged) after the step of this number, for a checkpoint.

        Raises UserError if training has diverged: such a state is not worth keeping.
        """
        [seconds] = all_reduce([self._clock()], "max")
        sums = self.loss_function.sums.tolist()
        loss_sum, *counts = all_reduce([float(self.loss_sum), *self.counts, *sums])
        self._check(number, loss_sum, self.norm.item())
        return self.tokens + int(counts[0]), [loss_sum, seconds, *counts]

    def evaluation(self, done: int, result: tuple[float, int] | None, loss_function: Loss | None = None) -> None:
        """Records the validation loss after `done` steps: (mean nats a trained token, number of tokens); None: nothing.

        loss_function: what was evaluated, if not the cross entropy.
        """
        if result is None:
            return
        loss, tokens = result
        if loss_function and (told := means_told(loss_function)):
            self.evaluated[done] = loss
            self._write({"step": done, "eval_loss": loss} | {f"eval_{name}": value for name, value in told.items()})
            text = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in told.items())
            self.say(f"step {done}: validation loss {loss:.4f}, {text}")
            return
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()  # inf, not an error, where it is too large
        self.evaluated[done] = loss
        self._write({"step": done, "eval_loss": loss, "eval_perplexity": perplexity, "eval_tokens": tokens})
        self.say(f"step {done}: validation loss {loss:.4f}, perplexity {perplexity:.3f} ({tokens} tokens)")

    def say(self, text: str) -> None:
        """Prints above the progress bar, on rank 0."""
        if rank() == 0:
            self.bar.write(text)

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is None:
            return
        line = {key: value if math.isfinite(value) else None for key, value in line.items()}  # JSON has no NaN
        if os.fstat(self.file.fileno()).st_nlink == 0:
            raise UserError(f"{self.file.name} was removed while the run wrote to it: leave --output-dir as it is")
        end, rest = self.file.tell(), (json.dumps(line) + "\n").encode()
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.file.name, end)  # without half a line
            raise UserError(_unwritable(self.file.name, error)) from None
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


def means_told(loss_function: Loss) -> dict[str, float]:
    """What a loss has added up, of all ranks: how many, and means over these; {} of the cross entropy."""
    if not loss_function.names:
        return {}
    count, *sums = all_reduce(loss_function.sums.tolist())
    return dict(zip(loss_function.names, [int(count), *(value / max(1, count) for value in sums)], strict=True))


def _unwritable(file: Path | str, error: OSError) -> str:
    return f"{disk_text(error, file, 'cannot be written')}, and go on with --resume auto"


def _reopen(file: Path, start: Progress) -> BinaryIO:
    """metrics.jsonl, open for appending, without the lines after the checkpoint that the run resumes from."""
    kept = []
    for text in read_bytes(file).decode(errors="replace").splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # cut off when the run was killed
            continue
        if misfit(line, {"step": int}):  # not a line of ours
            continue
        if line["step"] < start.step or (line["step"] == start.step and ("loss" in line or not start.evaluate)):
            kept.append(text + "\n")
    try:
        write_whole(file, "".join(kept))
        return file.open("ab", buffering=0)
    except OSError as error:
        raise UserError(_unwritable(file, error)) from None


def read_metrics(file: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The lines of metrics.jsonl: (those of steps, those of evaluations). Raises UserError for one that is cut off."""
    lines: list[dict[str, Any]] = []
    numbers = [*PLOTTED, *(f"eval_{name}" for name in PLOTTED)]
    for number, text in enumerate(read_bytes(file).decode(errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        shape = {"step": int} | {name: (None, float) for name in numbers if isinstance(line, dict) and name in line}
        if misfit(line, shape):
            raise UserError(
                f"{file}, line {number} is none of a run's: was the run that wrote it killed? drop the line"
            )
        lines.append(line)
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def plot_loss(metrics_file: Path, image: Path) -> bool:
    """Draws what a run trained on and evaluated over the steps: the loss, and of pairs of answers reward margin and
    accuracy. Returns False, drawing nothing, without matplotlib."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trained, evaluated = read_metrics(metrics_file)
    names = [name for name in PLOTTED if any(name in m for m in trained)] or ["loss"]
    figure = Figure(figsize=(7, 4 + 3 * (len(names) - 1)))
    for name, axes in zip(names, figure.subplots(len(names), squeeze=False)[:, 0], strict=True):
        for lines, key, style, label in (
            (trained, name, "-", "training"),
            (evaluated, f"eval_{name}", "o-", "validation"),
        ):
            there = [m for m in lines if key in m]
            if there or lines is trained:
                width = 1 if lines is trained else None
                axes.plot([m["step"] for m in there], [m[key] for m in there], style, lw=width, label=label)
        unit = " (nats a trained token)" if len(names) == 1 else " (mean over pairs)"
        axes.set(xlabel="optimizer step", ylabel=PLOTTED[name] + unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, dpi=120)
    except (ArithmeticError, LookupError, ValueError) as error:  # the type depends on the version of matplotlib
        raise UserError(
            f"{metrics_file}: its numbers are too large to be drawn ({error}): remove those lines"
        ) from None
    try:
        write_whole(image, drawn.getvalue())
    except OSError as error:
        raise UserError(f"{disk_text(error)}, and draw it by tools/plot_metrics.py") from None
    return True
