"""What surrounds the steps of every recipe: data that is read ahead, learning rate, metrics, evaluation, checkpoints."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from minillama.data.batch import Batch, collate
from minillama.model.llama import Llama
from minillama.parallel.heartbeat import stand
from minillama.parallel.processes import rank
from minillama.training.checkpoint import Checkpoints
from minillama.training.config import RunConfig
from minillama.training.metrics import Metrics
from minillama.training.optim import LossScaler, learning_rate
from minillama.training.out_of_memory import out_of_memory_explained
from minillama.training.plan import Step, count_steps, eval_batches, prefetched, steps
from minillama.training.profiling import Profiler, profiled
from minillama.training.run import Run
from minillama.training.step import CrossEntropy, Loss, evaluate


@dataclass
class Loop:
    """The steps of a run, and what is done after each."""

    config: RunConfig
    run: Run
    model: Llama
    optimizer: torch.optim.Optimizer
    scaler: LossScaler | None
    """For fp16"""
    metrics: Metrics
    checkpoints: Checkpoints
    profiler: Profiler
    total: int
    """Steps of the whole run"""
    loss_function: Loss

    def steps(self) -> Iterator[tuple[Step, list[Batch]]]:
        """Each step from run.progress on, with its micro-batches on the device. Sets the step's learning rate.

        Evaluates first if that is due. A thread makes the batches while the previous step is computed.
        """
        config, run = self.config, self.run
        if run.progress.evaluate:
            self._evaluate(run.progress.step)
        self.checkpoints.leave_if_stopping(self.metrics)

        def load(step: Step) -> list[Batch]:
            return [collate(run.train, packs, run.tokenizer.pad_id, run.device) for packs in step.micro_batches]

        self.model.train()
        own_steps = steps(run.train, config.train, config.seed, rank(), run.mesh.size(), run.progress)
        for step, batches in prefetched(own_steps, load):
            for group in self.optimizer.param_groups:
                lr = learning_rate(step.number, step.epoch, self.total, config.optim)
                group["lr"] = lr * group["lr_factor"]
            stand(f"step {step.number + 1}")
            with self.metrics.waiting():
                ready = batches.result()
            yield step, ready

    def after(self, step: Step, loss: Tensor, norm: Tensor, batches: list[Batch]) -> None:
        """Logs a step; evaluates and saves if that is due; ends the process on a signal.

        loss, norm: what train_step returned. Raises UserError if training has diverged.
        """
        self.metrics.step(step, self.optimizer.param_groups[0]["lr"], loss, norm, batches)
        evaluation_due = self.config.eval.due(step)
        if evaluation_due:
            self._evaluate(step.number + 1)
        self.checkpoints.after(step, self.metrics, evaluation_due=evaluation_due)

    def _evaluate(self, done: int) -> None:
        run = self.run
        stand(f"the evaluation after step {done}")
        if run.validation:
            train, pad_id = self.config.train, run.tokenizer.pad_id
            first_size = run.progress.packs_per_step // (train.batch_size * train.accumulate)
            batches = eval_batches(
                run.validation, self.config.eval, pad_id, run.device, rank(), run.mesh.size(), first_size
            )
            loss_function = copy.copy(self.loss_function)  # the sums of steps that are not logged yet stay as they are
            loss_function.sums = torch.zeros_like(loss_function.sums)
            with self.metrics.paused():
                result = evaluate(self.model, batches, self.checkpoints.stopping, loss_function)
            self.metrics.evaluation(done, result, loss_function)


@contextmanager
def training_loop(
    config: RunConfig, run: Run, model: Llama, optimizer: torch.optim.Optimizer, loss_function: Loss | None = None
) -> Iterator[Loop]:
    """Around training: opens metrics.jsonl, loads the checkpoint to resume from, and closes everything at the end.

    Every rank must enter it. Inside, SIGTERM and SIGUSR1 save and end the run, and an out-of-memory error says what
    would help.
    """
    total = count_steps(run.train, config.train, run.progress.packs_per_step)
    scaler = LossScaler() if run.fsdp.precision == "fp16" else None
    dtype = run.fsdp.compute_dtype
    loss_function = loss_function or CrossEntropy()
    metrics = Metrics(config.output_dir, config.log, model, run.device, dtype, total, run.progress, loss_function)
    torch.manual_seed(config.seed + rank())  # dropout differs between ranks
    with (
        Checkpoints(
            config.output_dir,
            config.checkpoint,
            model,
            optimizer,
            scaler,
            run.device,
            resume_from=run.checkpoint,
            packs_per_step=run.progress.packs_per_step,
            seed=config.seed,
            timeout_minutes=config.fsdp.timeout_minutes,
            about={"flags": json.loads(json.dumps(asdict(config), default=str)), "fingerprints": run.fingerprints},
        ) as checkpoints,
        out_of_memory_explained(config, run.fsdp, model, optimizer, metrics),
        profiled(config.profile, metrics) as profiler,
    ):
        yield Loop(config, run, model, optimizer, scaler, metrics, checkpoints, profiler, total, loss_function)
    metrics.close()
