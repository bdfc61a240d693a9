"""FLOPs of a step, counted and compared with the formula, and where a step's time and memory go."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from minillama.data.batch import Batch
from minillama.errors import UserError, disk_text
from minillama.parallel.processes import all_reduce, rank
from minillama.training.flops import FlopCounter, step_flops
from minillama.training.metrics import Metrics

# ---------------------------------------------------------------------------------------------------------------------
# --profile


WAIT, WARMUP, ACTIVE = 1, 2, 3
"""Steps before a trace, steps in which the profiler runs but keeps nothing, steps in the trace"""


@dataclass(frozen=True)
class ProfileConfig:
    """Where a step's time and memory go."""

    flops: bool = False
    """Count the FLOPs of one step over all processes, compare with those that mfu is computed from, time the step
    after it, and print TFLOP/s and MFU."""
    flops_start: int = 3
    """Which step of this run to count, from 1."""
    trace_dir: Path | None = None
    """Folder for a trace of steps 4 to 6 of this run, a file a process, for https://ui.perfetto.dev or TensorBoard. The
    operations that took longest are printed."""
    memory_snapshot: Path | None = None
    """CUDA: what was allocated and freed, and where in the code, for https://pytorch.org/memory_viz. Written when
    training ends or memory runs out: to this file if it ends in .pickle (of several processes each adds its rank), else
    into this folder."""

    def __post_init__(self) -> None:
        if self.flops_start < 1:
            raise UserError(f"--profile.flops-start {self.flops_start}: must be at least 1")
        if self.flops and self.trace_dir:
            raise UserError("--profile.flops and --profile.trace-dir: give one of them, each slows the other's steps")

    def check_steps(self, steps: int) -> None:
        """Raises UserError if a run of so many steps is too short for what is asked."""
        needed, flag = 0, ""
        if self.flops:
            needed, flag = (
                self.flops_start + 1,
                f"--profile.flops of step {self.flops_start}, with the next to be timed,",
            )
        elif self.trace_dir:
            needed, flag = WAIT + WARMUP + ACTIVE, "--profile.trace-dir"
        if steps < needed:
            raise UserError(
                f"{flag} needs a run of at least {needed} steps, and this one makes {steps}: raise --train.max-steps or "
                "--train.epochs"
            )

    def make_folders(self) -> None:
        """Raises UserError for a place that cannot be written, before time is lost."""
        snapshot = self.memory_snapshot and self.snapshot_file().parent
        for flag, folder in (("trace-dir", self.trace_dir), ("memory-snapshot", snapshot)):
            try:
                if folder:
                    folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--profile.{flag} {folder} cannot be written: {error.strerror}") from None

    def snapshot_file(self) -> Path:
        """This rank's."""
        assert self.memory_snapshot
        if self.memory_snapshot.suffix != ".pickle":
            return self.memory_snapshot / f"rank{rank()}.pickle"
        alone = dist.get_world_size() == 1
        return self.memory_snapshot.with_stem(self.memory_snapshot.stem + ("" if alone else f"-rank{rank()}"))


class Profiler:
    """Counts or traces the steps that it is around."""

    def __init__(self, config: ProfileConfig, metrics: Metrics, trace: profile | None) -> None:
        self.counted_step = config.flops_start if config.flops else -1
        self.metrics, self.trace = metrics, trace
        self.steps = 0

    @contextmanager
    def step(self, batches: list[Batch]) -> Iterator[None]:
        """Around a step, of these micro-batches on this rank."""
        self.steps += 1
        if self.steps == self.counted_step:
            with FlopCounter() as counter:
                yield
            self.counted = all_reduce([counter.in_products, counter.in_attention])
            self.needed = self._needed(batches)
        elif self.steps == self.counted_step + 1:
            needed = sum(self._needed(batches))  # a collective: all ranks begin together
            self._wait()
            start = time.perf_counter()
            yield
            self._wait()
            [seconds] = all_reduce([time.perf_counter() - start], "max")
            self._report(needed, seconds)
        else:
            yield
        if self.trace is not None:
            with self.metrics.paused():  # writing it takes seconds
                self.trace.step()

    def _needed(self, batches: list[Batch]) -> list[float]:
        """FLOPs that a step needs on all ranks, by the formula: (in matrix products, in attention)."""
        tokens, trained = sum(batch.count for batch in batches), sum(batch.trained for batch in batches)
        products = step_flops(self.metrics.model, tokens, trained, squares=0)
        attention = step_flops(self.metrics.model, 0, 0, squares=sum(batch.squares for batch in batches))
        return all_reduce([products, attention])

    def _wait(self) -> None:
        if self.metrics.device == "cuda":
            torch.cuda.synchronize()

    def _report(self, needed: float, seconds: float) -> None:
        ratio = needed / sum(self.needed)
        counted = sum(self.counted) * ratio
        [rate] = all_reduce([self.metrics.rate])
        self.metrics.say(
            f"flops       step {self.counted_step}, of all processes, in TFLOP: matrix products + attention\n"
            f"            counted {_tera(self.counted)}: also padding and recomputation; attention as whole squares,\n"
            f"                    and its scores twice: 14/6 of what is needed\n"
            f"            needed  {_tera(self.needed)}: by the formula of mfu\n"
            f"            timed: the step after it, as counting takes time: {ratio:.6g} x as much, {seconds:.6g} s\n"
            f"            counted x {ratio:.6g} / seconds = {counted / seconds / 1e12:.6g} TFLOP/s\n"
            f"            MFU = needed x {ratio:.6g} / seconds / {rate / 1e12:.6g} TFLOP/s of matmuls = "
            f"{needed / seconds / rate:.2%}"
        )


def _tera(parts: list[float]) -> str:
    return f"{' + '.join(f'{part / 1e12:.6g}' for part in parts)} = {sum(parts) / 1e12:.6g}"


@contextmanager
def profiled(config: ProfileConfig, metrics: Metrics) -> Iterator[Profiler]:
    """Around training: does what the flags ask. Each step must run inside the step() of the Profiler it yields."""
    with ExitStack() as stack:
        if config.memory_snapshot:
            stack.enter_context(_memory_recorded(config.snapshot_file()))
        trace = stack.enter_context(_trace(config.trace_dir, metrics)) if config.trace_dir else None
        yield Profiler(config, metrics, trace)


def _trace(folder: Path, metrics: Metrics) -> profile:
    def write(trace: profile) -> None:
        file = folder / f"rank{rank()}.pt.trace.json.gz"
        try:
            trace.export_chrome_trace(str(file))
        except OSError as error:  # no reason to end the training
            file.unlink(missing_ok=True)
            print(f"warning: {disk_text(error, file, 'cannot be written')}", file=sys.stderr, flush=True)
        metrics.say(f"trace       {folder}; {longest_operations(trace, metrics.device)}")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if metrics.device == "cuda" else [])]
    times = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    return profile(activities=activities, schedule=times, on_trace_ready=write, record_shapes=True)


def longest_operations(trace: profile, device: str, count: int = 10) -> str:
    """A table of the operations in which this rank spent most time, without the time of the operations they call."""
    spent = [
        (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total, event.count, event.key)
        for event in trace.key_averages()
        if event.device_type == DeviceType.CPU and not event.key.startswith("ProfilerStep")
    ]
    total = sum(time for time, _, _ in spent)  # microseconds
    lines = [f"rank {rank()} spent {total / 1e6:.4g} s in operations on {device}, most in:"]
    for time_in_it, calls, name in sorted(spent, reverse=True)[:count]:
        lines.append(f"            {time_in_it / max(total, 1):6.1%} {calls:7} calls  {name}")
    return "\n".join(lines)


@contextmanager
def _memory_recorded(file: Path) -> Iterator[None]:
    torch.cuda.memory._record_memory_history(max_entries=100_000)  # without a limit it grows with every step
    try:
        yield
    finally:  # also when memory runs out, while the error keeps the step's tensors alive
        torch.cuda.memory._dump_snapshot(str(file))
        torch.cuda.memory._record_memory_history(enabled=None)
