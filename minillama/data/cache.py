"""Tokenized and packed data as flat files, built once for all processes and runs of a machine and memory-mapped by each.

DIR/<documents>/            tokens.bin trained.bin offsets.bin refused.txt about.json
DIR/<documents>/<packs>/    starts.bin sizes.bin firsts.bin lengths.bin about.json
DIR/<documents>/<packs>/reference-<model>/    values.bin about.json: log-probabilities by a model, for preference tuning

Both names are hashes of all that decides the content: the rows, the tokenizer, the settings, the code that reads and
tokenizes. A folder has its name only once it is complete.
"""

import hashlib
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import RawArray, Value, get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minillama.data.built_folder import built, describe, is_sound
from minillama.data.datasets import DataConfig, Source, training_sources, validation_source
from minillama.data.documents import Documents
from minillama.data.encoders import encode_rows
from minillama.data.packing import Packed, Part, pack, pad
from minillama.data.permutation import permuted
from minillama.errors import UserError
from minillama.files import cache_folder, read_json
from minillama.progress import progress

DOCUMENTS = {"tokens": np.int32, "trained": np.bool_, "offsets": np.int64}
PARTS = ("tokens", "trained", "lengths")
"""Files of a process that tokenizes"""
PACKS = {"starts": np.int64, "sizes": np.int64, "firsts": np.int64, "lengths": np.int64}
REFERENCE = {"values": np.float32}
CODE = {
    "data": ("cache", "datasets", "documents", "encoders", "packing", "permutation", "rows"),
    "tokenizer": ("chat", "engines", "files", "template", "tokenizer"),
}
"""Modules whose code decides what is in the cache: it is rebuilt when one of them changes"""
CHUNK_BYTES, CHUNK_ROWS = 2**18, 1000
"""Bytes, and rows, of a chunk that is tokenized at a time; whichever is reached first"""
LARGE = 2**20
"""With so many bytes of rows, or rows of a hub's data set, the work is shared among processes"""

NEVER = 2**62

Held = Literal["nothing", "out", "back"]
"""Which rows of the sources: all, those held out for evaluation, or the others"""


def prepare(
    config: DataConfig, tokenizer: Any, seed: int, *, validation: bool, processes: int = 1
) -> tuple[Path, Path | None]:
    """Tokenizes and packs what is not in the cache yet: the folders of the training packs and, if `validation`, of those
    to evaluate on, for `open_packed`. If another process is building the same, waits for it.

    Without a --data.path: the bundled sets. Alpaca is published as one file, so of a path alone its first 5% of rows are
    held out, as llama-recipes does. Raises UserError for what is wrong with flags, files and rows, or the cache's folder.
    """
    sources = training_sources(config)
    for source in sources:
        source.size()  # a file that is not there is said before what else is missing
    other = validation_source(config) if validation else None
    documents = _documents(sources, config, tokenizer, processes)
    if not validation:
        return _packs(documents, sources, config, seed, "nothing"), None
    if other is None:
        held_out = _packs(documents, sources, config, seed, "out")
        return _packs(documents, sources, config, seed, "back"), held_out
    others = _documents([other], config, tokenizer, processes)
    return _packs(documents, sources, config, seed, "nothing"), _packs(others, [other], config, seed, "nothing")


def prepare_evaluation(config: DataConfig, tokenizer: Any, seed: int, processes: int = 1) -> Path:
    """The folder of packs to evaluate an existing model on, made as `prepare` makes them.

    Each row once: those of --data.val-path; else what --data.val-fraction and `seed` hold out of the training rows; else
    all of --data.path or --data.mixture.
    """
    if config.val_fraction or (config.mixture and not config.val_path):
        sources = training_sources(config)
    else:
        alone = replace(config, path=config.val_path or config.path, mixture=None)
        sources = [replace(source, split="validation") for source in training_sources(alone)]
    sources = [replace(source, weight=1.0) for source in sources]
    documents = _documents(sources, config, tokenizer, processes)
    return _packs(documents, sources, config, seed, "out" if config.val_fraction else "nothing")


def open_packed(folder: Path) -> Packed:
    """The packs in a folder that `prepare` named, memory-mapped. Raises UserError if they are damaged."""
    about, arrays = _open(folder, PACKS)
    documents = open_documents(folder.parent)
    return Packed(about.pop("batching"), about.pop("context_length"), documents, **arrays, **about, folder=folder)


def open_documents(folder: Path) -> Documents:
    """The documents above a folder of packs, memory-mapped. Raises UserError if they are damaged."""
    about, arrays = _open(folder, DOCUMENTS)
    return Documents(**arrays, **{name: about[name] for name in ("fingerprint", "refused", "had_ends", "per_row")})


def open_reference(packs: Path, key: str) -> np.ndarray | None:
    """What keep_reference has kept there by the same key, memory-mapped; None if it is not there, or damaged."""
    folder = packs / f"reference-{key}"
    return _open(folder, REFERENCE)[1]["values"] if is_sound(folder) else None


def keep_reference(packs: Path, key: str, values: np.ndarray) -> None:
    """Keeps values, float32 (N,), one a token of the documents, in a folder of packs."""

    def build(part: Path) -> None:
        values.tofile(part / "values.bin")
        describe(part, REFERENCE, {})

    built(packs / f"reference-{key}", build)


def refused_rows(folder: Path) -> list[str]:
    """The rows that --data.bad-rows skip left out, above a folder of packs: where each is, and what is wrong with it."""
    return _lines(folder.parent / "refused.txt")


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def _open(folder: Path, kinds: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        about = read_json(folder / "about.json")
        files = about.pop("files")
        wrong = [name for name in files if (folder / name).stat().st_size != files[name]["bytes"]]
    except (OSError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{folder} is damaged ({error}): remove it, it will be built again") from None
    if wrong:
        raise UserError(f"{folder} is damaged ({wrong[0]} has not the size it had): remove it, it will be built again")
    # as plain arrays: slicing a np.memmap takes several times as long
    return about, {name: np.memmap(folder / f"{name}.bin", kind, "r").view(np.ndarray) for name, kind in kinds.items()}


def _documents(sources: list[Source], config: DataConfig, tokenizer: Any, processes: int) -> Path:
    """The folder of all documents of the sources, end to end."""
    described = [[source.dataset, dict(source.columns), source.content(config, tokenizer)] for source in sources]
    name = _hash(described, config.train_on, config.pairs, tokenizer.fingerprint)
    folder = built(
        cache_folder(config.cache_dir) / name, lambda part: _tokenize(part, sources, config, tokenizer, processes)
    )
    if config.bad_rows == "error" and (problems := _lines(folder / "refused.txt")):
        raise UserError(problems[0])
    return folder


def _packs(documents: Path, sources: list[Source], config: DataConfig, seed: int, held: Held) -> Path:
    """The folder of the packs of the sources' rows."""
    too_long = [_too_long(config, source) for source in sources]
    weights = [source.weight for source in sources]
    settings = [weights, config.batching, config.context_length, too_long, held, config.val_fraction, seed]

    def build(part: Path) -> None:
        opened = open_documents(documents)
        parts = [
            Part(rows, long)
            for rows, long in zip(_choose(documents, sources, config, seed, held), too_long, strict=True)
        ]
        if config.batching == "packing":
            packed = pack(opened, config.context_length, seed, parts)
        else:
            packed = pad(opened, config.context_length, parts)
        for name in PACKS:
            getattr(packed, name).tofile(part / f"{name}.bin")
        about = {"batching": packed.batching, "context_length": packed.context_length, "long": packed.long}
        describe(part, PACKS, about | {"fingerprint": packed.fingerprint})

    return built(documents / _hash(settings), build)


def _too_long(config: DataConfig, source: Source) -> Literal["drop", "truncate", "split"]:
    if config.too_long != "auto":
        return config.too_long
    return "split" if source.dataset == "text" else "drop" if config.batching == "packing" else "truncate"


def _choose(documents: Path, sources: list[Source], config: DataConfig, seed: int, held: Held) -> list[np.ndarray]:
    """The numbers of the documents to take of each source."""
    counts, first, chosen = read_json(documents / "about.json")["rows"], 0, []
    for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
        rows = np.arange(first, first + count)
        first += count
        if held != "nothing" and config.val_fraction:
            rows = rows[permuted(np.arange(count), count, seed, number, 0)]
            out = round(count * config.val_fraction)
        else:
            out = 0 if held == "nothing" else count // 20
        rows = np.sort(rows[:out] if held == "out" else rows[out:])
        if held != "out":
            times, rest = divmod(source.weight, 1)
            some = permuted(np.arange(round(rest * len(rows))), len(rows), seed, number, 1)
            rows = np.concatenate((np.tile(rows, int(times)), np.sort(rows[some])))
        chosen.append(rows)
    if not sum(map(len, chosen)):
        share = f"{config.val_fraction:g}" if config.val_fraction else "a twentieth"
        bad = _lines(documents / "refused.txt")
        skipped = f"; {len(bad)} bad rows are skipped, the first: {bad[0]}" if bad else ""
        raise UserError(
            f"{', '.join(source.name for source in sources)}: of {sum(counts)} rows {share}, to evaluate on, leaves "
            f"none {'there' if held == 'out' else 'to train on'}: give --data.val-path or another --data.val-fraction"
            f"{skipped}"
        )
    return chosen


# --- tokenizing: every process goes through all rows, cut into chunks, and takes its share of these


@dataclass(frozen=True)
class Job:
    """Shared by the processes that tokenize."""

    folder: Path
    sources: list[Source]
    config: DataConfig
    tokenizer: Any
    processes: int
    progress: Callable[[int, int], Any]
    """Called by process k with how much more it has read"""
    first_bad: Any
    """.value: the first chunk known to have a row that ends the run"""


_job: Job
"""In a process of the pool"""


@dataclass(frozen=True)
class Chunk:
    """What a process has written of some rows."""

    number: int
    source: int
    documents: int
    tokens: int
    refused: list[str]
    had_ends: int


def _tokenize(folder: Path, sources: list[Source], config: DataConfig, tokenizer: Any, processes: int) -> None:
    sizes = [source.size() for source in sources]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    if total is None or total < LARGE:
        processes = 1
    with progress(total=total, desc="tokenizing", unit_scale=True, delay=1, leave=False) as bar:
        if processes == 1:
            alone = Job(folder, sources, config, tokenizer, 1, lambda k, read: bar.update(read), Value("q", NEVER))
            shares = [_share(alone, 0)]
        else:
            shares = _shares(folder, sources, config, tokenizer, processes, bar)
    chunks = sorted((chunk.number, k, chunk) for k, share in enumerate(shares) for chunk in share)
    refused = [problem for _, _, chunk in chunks for problem in chunk.refused]
    if refused and config.bad_rows == "error":
        raise UserError(refused[0])
    names = ", ".join(source.name for source in sources)
    if not any(chunk.documents for _, _, chunk in chunks):
        raise UserError(
            f"{names}: no row can be used; the first: {refused[0]}"
            if refused
            else f"{names} has no rows: give a file with at least one"
        )
    lines = (" ".join(problem.splitlines()) + "\n" for problem in refused)
    (folder / "refused.txt").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    fingerprint = _join(folder, [(k, chunk) for _, k, chunk in chunks])
    per_row = 2 if config.pairs else 1
    counts = [
        sum(chunk.documents for _, _, chunk in chunks if chunk.source == s) // per_row for s in range(len(sources))
    ]
    had_ends = sum(chunk.had_ends for _, _, chunk in chunks)
    about = {"rows": counts, "refused": len(refused), "had_ends": had_ends, "fingerprint": fingerprint}
    about["per_row"] = per_row
    describe(folder, DOCUMENTS, about)


def _shares(
    folder: Path, sources: list[Source], config: DataConfig, tokenizer: Any, processes: int, bar: Any
) -> list[list[Chunk]]:
    read, parent = RawArray("q", processes), os.getpid()

    def progress(k: int, count: int) -> None:
        read[k] += count
        if os.getppid() != parent:  # it was killed: nobody needs the result
            os._exit(1)

    job = Job(folder, sources, config, tokenizer, processes, progress, Value("q", NEVER))
    # Forked as PyTorch's data loaders are: nothing has to be imported, loaded or sent again. These processes use neither
    # the threads nor the GPU of their parent. Python 3.12 and later warns of its threads.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning), ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(processes, get_context("fork"), _enter, (job,)))
        futures = [pool.submit(_share_of_job, k) for k in range(processes)]
        try:
            for future in futures:
                while wait([future], timeout=0.2).not_done:
                    bar.update(sum(read) // processes - bar.n)
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError(
                "a process that tokenizes has died, for want of memory perhaps: give a smaller --data.workers"
            ) from None


def _enter(job: Job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all; one traceback is enough


def _share_of_job(k: int) -> list[Chunk]:
    try:
        return _share(_job, k)
    except BaseException:
        _job.first_bad.value = -1  # the others can stop
        raise


def _share(job: Job, k: int) -> list[Chunk]:
    """Tokenizes every n-th chunk of the rows, from the k-th on."""
    made: list[Chunk] = []
    number = -1
    with ExitStack() as stack:
        files = {name: stack.enter_context((job.folder / f"{name}.{k}").open("wb")) for name in PARTS}
        for s, source in enumerate(job.sources):
            for rows in _chunks(source, job, k):
                number += 1
                if number % job.processes != k:
                    continue
                if number > job.first_bad.value:
                    return made
                documents, refused = encode_rows(
                    rows, source.dataset, source.columns, job.tokenizer, job.config.train_on, job.config.pairs
                )
                made.append(Chunk(number, s, len(documents), len(documents.tokens), refused, documents.had_ends))
                if refused and job.config.bad_rows == "error":
                    with job.first_bad.get_lock():
                        job.first_bad.value = min(job.first_bad.value, number)
                    return made
                for name, array in zip(PARTS, (documents.tokens, documents.trained, documents.lengths), strict=True):
                    files[name].write(array.data)
    return made


def _chunks(source: Source, job: Job, k: int) -> Iterator[list[tuple[str, Callable[[], Any]]]]:
    chunk: list[tuple[str, Callable[[], Any]]] = []
    read = 0

    def progress(count: int) -> None:
        nonlocal read
        read += count
        job.progress(k, count)

    for row in source.rows(job.config, job.tokenizer, progress):
        chunk.append(row)
        if len(chunk) >= CHUNK_ROWS or read >= CHUNK_BYTES:
            yield chunk
            chunk, read = [], 0
    if chunk:
        yield chunk


def _join(folder: Path, chunks: list[tuple[int, Chunk]]) -> str:
    """Joins what the processes wrote, in the order of the rows; returns the documents' fingerprint."""
    digests = [hashlib.blake2b(digest_size=16) for _ in PARTS]
    total = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in DOCUMENTS}
        parts: dict[tuple[str, int], Any] = {}
        files["offsets"].write(np.int64(0).tobytes())
        for k, chunk in chunks:
            sizes = (4 * chunk.tokens, chunk.tokens, 8 * chunk.documents)
            for name, size, digest in zip(PARTS, sizes, digests, strict=True):
                if (name, k) not in parts:
                    parts[name, k] = stack.enter_context((folder / f"{name}.{k}").open("rb"))
                content = parts[name, k].read(size)
                digest.update(content)
                if name == "lengths":
                    offsets = total + np.cumsum(np.frombuffer(content, np.int64))
                    content, total = offsets.tobytes(), total + chunk.tokens
                files["offsets" if name == "lengths" else name].write(content)
    for part in {folder / f"{name}.{k}" for name, k in parts}:
        part.unlink()
    return hashlib.blake2b("".join(digest.hexdigest() for digest in digests).encode(), digest_size=16).hexdigest()


def _hash(*settings: Any) -> str:
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    for package, names in CODE.items():
        for name in names:
            digest.update((Path(__file__).parents[1] / package / f"{name}.py").read_bytes())
    return digest.hexdigest()
