"""Training state on the disk: saved whole or not at all, resumed on any number of processes."""

import json
import os
import shutil
import signal
import sys
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from minillama.errors import REMEDIES, UserError, disk_error
from minillama.files import described, read_json, size_text
from minillama.formats.hf_export import MAX_FILE_BYTES, split_by_size, write_tensors
from minillama.model.attention import BACKENDS
from minillama.model.llama import Llama
from minillama.parallel.heartbeat import stand
from minillama.parallel.processes import all_reduce, first_of_ranks, on_rank_zero, rank, say, texts_on_rank_zero
from minillama.parallel.sharding import reshard
from minillama.training.checkpoint_index import INDEX, IndexReader, read_into, write_index, write_part
from minillama.training.metrics import Metrics
from minillama.training.optim import LossScaler
from minillama.training.plan import Progress, Step
from minillama.training.resume import MANIFEST, Checkpoint, hash_of, saved_steps

T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointConfig:
    """The training state: trained parameters, optimizer, random numbers, place in the data."""

    every: int = 0
    """Steps between checkpoints; 0: after each epoch; -1: none, unless a signal stops the run."""
    keep: int = 2
    """The newest checkpoints that stay; 0: all."""
    best: bool = False
    """Save also after an evaluation with the lowest loss so far, and keep that one besides the newest."""
    save_optimizer: bool = True
    """Save the optimizer's state too. Without it a checkpoint is a third of the size, and a resumed run does not continue
    exactly."""
    format: Literal["sharded", "full"] = "sharded"
    """sharded: the format of torch.distributed.checkpoint, each process writes its part. full: safetensors of whole
    tensors, which are read without a process group. A run resumes from either on any number of processes."""
    async_save: bool = True
    """Copy the state to host memory and write it while training goes on."""

    def __post_init__(self) -> None:
        if self.every < -1:
            raise UserError(f"--checkpoint.every {self.every}: must be at least 1, or 0 or -1")
        if self.keep < 0:
            raise UserError(f"--checkpoint.keep {self.keep}: must be at least 1, or 0 for all")

    def due(self, step: Step) -> bool:
        """Whether to save once this step is made."""
        if self.every == -1:
            return False
        return step.is_last or ((step.number + 1) % self.every == 0 if self.every else step.ends_epoch)


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading


class Checkpoints:
    """The checkpoints of one run. Making it loads the one to resume from, if any, into model, optimizer and scaler.

    Every rank must make it, and call its methods at the same places. From then on SIGTERM and SIGUSR1 no longer kill
    the process: the running step ends, a checkpoint is written, and the process exits with 128 + the signal's number.
    """

    def __init__(
        self,
        output_dir: Path,
        config: CheckpointConfig,
        model: Llama,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler | None,
        device: str,
        *,
        packs_per_step: int,
        about: dict[str, Any],
        resume_from: Checkpoint | None = None,
        seed: int = 0,
        timeout_minutes: float = 30.0,
    ) -> None:
        """about: "flags" and "fingerprints", saved for the run that resumes to compare."""
        self.output_dir, self.config, self.about = output_dir, config, about
        self.model, self.optimizer, self.scaler, self.device = model, optimizer, scaler, device
        self.packs_per_step, self.seed = packs_per_step, seed
        self.folder = output_dir / "checkpoints"
        # A group of its own, on the host: a checkpoint is written while the steps use the other groups.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        cuda = device == "cuda"
        self.staging = StagingOptions(cuda, False, False, cuda)
        self.stager = DefaultStager(self.staging)
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None
        self.best: tuple[float, int] | None = None  # lowest evaluation loss, and the step it was found at
        self.signal = 0  # the signal that this process got
        self.stopped_by = 0  # the signal that any process got, the same on all ranks
        # of this start alone: rank 0 of a machine that was frozen may wake up in the middle of writing
        self.partial = on_rank_zero(lambda: _remove_leftovers(self.folder))
        if resume_from is not None:
            self._load(resume_from)
        self.handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _note(self, number: int, frame: object) -> None:
        self.signal = number

    def _state(self, optimizer: bool) -> dict[str, dict[str, Tensor]]:
        """What trains, by name; saved from and loaded into these very tensors."""
        reshard(self.model)  # after an evaluation: it is the sharded parameters that train
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        state = {"model": {name: p.detach() for name, p in trained.items()}}
        if optimizer:
            state["optimizer"] = {
                f"{name}.{key}": value for name, p in trained.items() for key, value in self.optimizer.state[p].items()
            }
        return state

    def _random(self) -> dict[str, Tensor]:
        """The state of this rank's generators. Random numbers are only used for dropout."""
        states = {f"{rank()}.cpu": torch.get_rng_state()}
        return states | {f"{rank()}.cuda": torch.cuda.get_rng_state()} if self.device == "cuda" else states

    def _load(self, checkpoint: Checkpoint) -> None:
        content, failed = checkpoint.content, f"{checkpoint.folder} cannot be loaded"
        state = self._state(optimizer=content["optimizer"])
        same_ranks = content["world_size"] == dist.get_world_size() and content["device"] == self.device
        if same_ranks:
            state["random"] = self._random()

        sharded = content["format"] == "sharded"

        def readers() -> dict[str, dcp.FileSystemReader]:
            found: dict[str, dcp.FileSystemReader]
            if sharded:
                sizes = {name: file["bytes"] for name, file in content["files"].items()}
                index = on_rank_zero(lambda: read_json(checkpoint.folder / INDEX))
                found = dict.fromkeys(state, IndexReader(checkpoint.folder, sizes, index))
            else:
                found = {part: dcp.HuggingFaceStorageReader(str(checkpoint.folder / part)) for part in state}
            for part, tensors in state.items():
                _check_shapes(found[part].read_metadata(), tensors, part, f"{part}." if sharded else "")
            return found

        def load() -> None:
            if sharded:
                read_into(state, reader["model"])
            else:
                for part, tensors in state.items():
                    read_into(tensors, reader[part])

        reader = self._together(readers, failed)
        self._together(load, failed)
        if same_ranks:
            torch.set_rng_state(state["random"][f"{rank()}.cpu"])
            if self.device == "cuda":
                torch.cuda.set_rng_state(state["random"][f"{rank()}.cuda"])
        else:  # any numbers will do, but not those that the run started with
            torch.manual_seed(zlib.crc32(f"{self.seed} {checkpoint.progress.step} {rank()}".encode()))
        if self.scaler and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        self.best = content["best"] and tuple(content["best"])
        if not content["optimizer"]:
            say("the checkpoint has no optimizer state: its moments start at zero")

    def stopping(self) -> bool:
        """Whether a signal has asked any rank to stop. Raises UserError if a checkpoint could not be written."""
        if self.stopped_by:
            return True
        failed = self.writing is not None and self.writing.done() and self.writing.exception() is not None
        self.stopped_by, any_failed = map(int, all_reduce([self.signal, failed], "max"))
        if any_failed:
            self.finish()
        return self.stopped_by > 0

    def leave_if_stopping(self, metrics: Metrics) -> None:
        """Ends the process with the signal's exit code if a signal has asked for it. Saves nothing."""
        if self.stopping():
            self._leave(metrics)

    def _leave(self, metrics: Metrics) -> None:
        self.finish()
        metrics.close()
        say(f"stopped by {signal.Signals(self.stopped_by).name}: to go on, the same command with --resume auto")
        sys.exit(128 + self.stopped_by)

    def after(self, step: Step, metrics: Metrics, *, evaluation_due: bool) -> None:
        """To be called after each step and its evaluation: saves if that is due; ends the process on a signal.

        evaluation_due: whether an evaluation was due, which a signal may have stopped.
        """
        done = step.number + 1
        loss = metrics.evaluated.get(done)
        best = self.config.best and loss is not None and (self.best is None or loss < self.best[0])
        if best:
            assert loss is not None
            self.best = (loss, done)
        stopping = self.stopping()
        if stopping or best or self.config.due(step):
            tokens, unlogged = metrics.so_far(done)
            with metrics.paused():
                self.save(
                    Progress(
                        step=done,
                        epoch=step.epoch,
                        cursor=step.cursor,
                        packs_per_step=self.packs_per_step,
                        tokens=tokens,
                        unlogged=unlogged,
                        evaluate=evaluation_due and loss is None,
                    )
                )
        if stopping:
            self._leave(metrics)
        if step.is_last and self.best is not None:
            metrics.say(f"lowest validation loss {self.best[0]:.4f}: checkpoints/step-{self.best[1]:08}")

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint, or with async_save starts to. Waits for the one before first."""
        stand(f"saving step {progress.step}")
        self.finish()
        state = self._state(self.config.save_optimizer)
        content = {
            "progress": asdict(progress),
            "world_size": dist.get_world_size(),
            "device": self.device,
            "attention": next((name for name, kind in BACKENDS.items() if kind is self.model.attention), None),
            "format": self.config.format,
            "optimizer": self.config.save_optimizer,
            "scaler": self.scaler and self.scaler.state_dict(),
            "best": self.best,
            **self.about,
            "torch": torch.__version__,
        }
        state["random"] = self._random()
        if self.config.async_save:
            self.writing = self.writer.submit(self._write, self._staged(state), content)
        else:
            self._write(state, content)

    def _staged(self, state: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """A copy of the state in host memory, which training does not change."""
        try:
            return self.stager.stage(state)  # type: ignore[return-value]
        except KeyError:  # before torch 2.12 a stager closes itself after its first copy
            self.stager = DefaultStager(self.staging)
            return self.stager.stage(state)  # type: ignore[return-value]

    def finish(self) -> None:
        """Waits until the last checkpoint is written. Raises what went wrong with it."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finishes the checkpoint that is being written, and restores the signal handlers."""
        try:
            self.finish()
        except UserError:
            if kind is None:  # the exception that is already raised is the cause, or worse
                raise
        else:
            if kind is KeyboardInterrupt and (steps := saved_steps(self.output_dir)):
                say(f"\nstopped: to go on from step {max(steps)}, the same command with --resume auto")
        finally:
            self.writer.shutdown()
            self.stager.close()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def _write(self, state: dict[str, dict[str, Tensor]], content: dict[str, Any]) -> None:
        """Writes under another name, and renames when all is on the disk. May run beside the steps, with its own group."""
        final = self.folder / f"step-{content['progress']['step']:08}"
        path = final.with_name(f"{final.name}.{self.partial}.partial")
        size = sum(tensor.numel() * tensor.element_size() for part in state.values() for tensor in part.values())
        failed = f"{final}, of {size_text(size)}, cannot be written"

        def write() -> str:
            name, index = write_part(path, state)
            return json.dumps({"files": {name: described(path / name)}, "index": index})

        try:
            self._together(lambda: _make_empty(path) if rank() == 0 else None, failed)
            mine = self._together(write, failed)
            texts = self._together(lambda: texts_on_rank_zero(mine, self.group), failed)
            written = [json.loads(text) for text in texts]
            self._together(lambda: self._complete(path, final, content, written) if rank() == 0 else None, failed)
        except BaseException:
            if rank() == 0:
                shutil.rmtree(path, ignore_errors=True)
            raise

    def _complete(self, path: Path, final: Path, content: dict[str, Any], written: list[dict[str, Any]]) -> None:
        """written: of each rank its "files" and their "index"."""
        files = {name: file for each in written for name, file in each["files"].items()}
        _check_shared(path, files)
        write_index(path, [each["index"] for each in written], {name: file["bytes"] for name, file in files.items()})
        if content["format"] == "full":
            _consolidate(path)
            files, more = {}, list(path.rglob("*.safetensors"))
        else:
            more = [path / ".metadata", path / INDEX]
        content["files"] = files | {str(file.relative_to(path)): described(file) for file in more}
        with (path / MANIFEST).open("w") as file:
            json.dump(content | {"sha256": hash_of(json.loads(json.dumps(content)))}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if not path.exists():
            raise UserError("another process has removed it: the run goes on elsewhere")
        _remove(final)  # left by a run that was resumed from an earlier step
        path.rename(final)
        _sync_folder(self.folder)
        keep, best = self.config.keep, content["best"]
        steps = saved_steps(self.output_dir)
        for number in list(steps)[:-keep] if keep else ():
            if best is None or number != best[1]:
                _remove(steps[number])

    def _together(self, task: Callable[[], T], failed: str) -> T:
        """What the task returns on this rank. Raises UserError on every rank if it fails on one, or one has ended."""
        result, problem = None, None
        try:
            result = task()
        except Exception as error:
            problem = _first_line(error)
        try:
            text = first_of_ranks(problem, self.group)
        except RuntimeError as error:  # its connection is closed
            raise UserError(f"{failed}: {problem or 'another process has ended'} ({_first_line(error)})") from None
        if text is not None:
            raise UserError(f"{failed}: {text}")
        return cast(T, result)


def _check_shapes(metadata: Metadata, tensors: Mapping[str, Tensor], part: str, prefix: str) -> None:
    """Raises UserError unless this part of a checkpoint has exactly these tensors, in these shapes."""
    saved = {
        name.removeprefix(prefix): list(tensor.size)
        for name, tensor in metadata.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(tensor, TensorStorageMetadata)
    }
    wanted = {name: list(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in wanted.keys() - saved.keys()]
    if part != "random":  # of which each rank takes its own
        problems += [f"{name} is not part of this run" for name in saved.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {saved[name]}, not {wanted[name]}"
        for name in saved.keys() & wanted.keys()
        if saved[name] != wanted[name]
    ]
    if problems:
        raise UserError(f"{part}: {'; '.join(sorted(problems)[:4])}{'; ...' if len(problems) > 4 else ''}")


def _consolidate(path: Path) -> None:
    """Turns what all ranks wrote into safetensors files of whole tensors, in a folder each for model, optimizer, random.

    Takes the memory of one file.
    """
    reader = IndexReader(path)
    metadata = reader.index.state_dict_metadata
    saved = {name: tensor for name, tensor in metadata.items() if isinstance(tensor, TensorStorageMetadata)}
    for part in sorted({name.partition(".")[0] for name in saved}):
        sizes = {
            name: tensor.size.numel() * tensor.properties.dtype.itemsize
            for name, tensor in saved.items()
            if name.startswith(f"{part}.")
        }
        (path / part).mkdir()
        for number, names in enumerate(split_by_size(sizes, MAX_FILE_BYTES), 1):
            tensors = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype) for name in names}
            read_into(tensors, reader)
            file = path / part / f"{number:05}.safetensors"
            write_tensors(file, {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()})
            with file.open("rb+") as written:
                os.fsync(written.fileno())
    for file in (*path.glob("*.distcp"), path / ".metadata", path / INDEX):
        file.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _check_shared(path: Path, names: Iterable[str]) -> None:
    there = {file.name for file in path.iterdir()}
    if missing := [name for name in names if name not in there]:
        raise UserError(
            f"{missing[0]}, of another machine, is not there: --output-dir must be on a disk that all share"
        )


def _remove(checkpoint: Path) -> None:
    """Renames it first, so that it is never found with a part of its files."""
    if checkpoint.exists():
        dying = checkpoint.with_name(checkpoint.name + ".deleted")
        checkpoint.rename(dying)
        shutil.rmtree(dying)


def _remove_leftovers(folder: Path) -> str:
    """Removes what a killed run was writing or removing; returns a name that it did not use."""
    for path in [*folder.glob("step-*.partial"), *folder.glob("step-*.deleted")]:
        shutil.rmtree(path)
    return uuid.uuid4().hex[:8]


def _sync_folder(folder: Path) -> None:
    """Flushes a folder's names to the disk, before anything relies on them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or repr(error)).splitlines()[0]
    if full_disk := disk_error(error):
        text = f"{full_disk.strerror}: {REMEDIES[full_disk.errno or 0]}, and go on with --resume auto"
    return f"{text} (rank {rank()})"
