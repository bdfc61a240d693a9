"""How fast rows become packs, compared with datasets.map with the same tokenizer, and how much memory that takes.

python tools/measure/data_speed.py --tokenizer MODEL_FOLDER --rows FILE.json --folder /tmp/speed

Copies FILE's rows, with numbers so that no two are the same, into a file of --megabytes. Both read, tokenize and store
it, in turns and in processes of their own. Needs pip install -e ".[hub]".
"""

import json
import multiprocessing
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from minillama.data.batch import collate
from minillama.data.cache import open_packed, prepare
from minillama.data.datasets import DataConfig, Source
from minillama.data.encoders import encode_rows
from minillama.data.rows import read_rows
from minillama.files import check_unused
from minillama.help import filled
from minillama.parallel.failures import user_errors
from minillama.tokenizer.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Config:
    """What to measure with."""

    tokenizer: Path
    """A model's folder."""
    rows: Path
    """Rows to copy."""
    folder: Path
    """For the large file and the caches; created if needed. They are removed at the end."""
    dataset: str = "samsum"
    """The rows' format."""
    megabytes: int = 200
    processes: int = 2
    repeat: int = 2


def write_rows(config: Config, file: Path) -> int:
    rows = [read() for _, read in read_rows(config.rows)]
    written, number = 0, 0
    with file.open("w", encoding="utf-8") as opened:
        while written < config.megabytes * 10**6:
            text = json.dumps(rows[number % len(rows)], ensure_ascii=False)
            written += opened.write(re.sub(r"(?<=[a-z]) (?=[a-z])", f" {number} ", text, count=2) + "\n")
            number += 1
    return file.stat().st_size


def data_config(config: Config) -> DataConfig:
    folder = config.folder
    return DataConfig(config.dataset, folder / "rows.jsonl", cache_dir=folder / "ours", workers=config.processes)


def ours(config: Config, answer: Any) -> None:
    tokenizer = load_tokenizer(config.tokenizer)
    train, _ = prepare(data_config(config), tokenizer, 0, validation=False, processes=config.processes)
    answer.send(len(open_packed(train).documents.tokens))


def read_all(config: Config, answer: Any) -> None:
    """What a rank does with the packs, without training: reads all of them."""
    tokenizer = load_tokenizer(config.tokenizer)
    packed = open_packed(prepare(data_config(config), tokenizer, 0, validation=False)[0])
    began = time.perf_counter()
    tokens = sum(collate(packed, [p], 0, "cpu").count for p in packed.order(0, 0).tolist())
    answer.send(f"{(time.perf_counter() - began) / len(packed) * 1e3:.2f} ms a pack of {tokens // len(packed)} tokens")


def second_start(config: Config, answer: Any) -> None:
    tokenizer = load_tokenizer(config.tokenizer)
    began = time.perf_counter()
    open_packed(prepare(data_config(config), tokenizer, 0, validation=False)[0])
    answer.send(f"found in the cache after {time.perf_counter() - began:.2f} s")


def theirs(config: Config, answer: Any) -> None:
    import datasets
    from pyarrow import compute

    tokenizer, source = load_tokenizer(config.tokenizer), Source(config.dataset, None, "train")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        documents, _ = encode_rows([("", lambda: dict(row))], source.dataset, source.columns, tokenizer)
        return {"input_ids": documents.tokens, "trained": documents.trained}

    datasets.disable_progress_bars()
    cache = str(config.folder / "theirs")
    rows = datasets.load_dataset("json", data_files=str(config.folder / "rows.jsonl"), cache_dir=cache, split="train")
    mapped = rows.map(encode, num_proc=config.processes, remove_columns=rows.column_names, new_fingerprint="x")
    answer.send(sum(compute.sum(compute.list_value_length(chunk)).as_py() for chunk in mapped.data["input_ids"].chunks))


def resident(pid: int) -> list[tuple[int, int]]:
    """(All, anonymous) bytes of resident memory of a process and each of its descendants."""
    found: dict[int, tuple[int, int, int]] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # it has ended
            continue
        kilobytes = (int(lines.get(name, "0 kB").split()[0]) for name in ("VmRSS", "RssAnon"))
        found[int(status.parent.name)] = (int(lines["PPid"]), *(1024 * size for size in kilobytes))
    family = {pid}
    while more := {child for child, (parent, *_) in found.items() if parent in family} - family:
        family |= more
    return [found[member][1:] for member in family if member in found]


def measured(work: Callable[[Config, Any], None], config: Config) -> tuple[float, Any, str]:
    """Seconds, what the work says, and the memory of the largest of its processes, imports and tokenizer included."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(config, there))
    began, most, anonymous = time.perf_counter(), 0, 0
    process.start()
    while process.is_alive():
        for rss, anon in resident(process.pid or 0):
            most, anonymous = max(most, rss), max(anonymous, anon)
        process.join(0.05)
    assert process.exitcode == 0, work.__name__
    memory = f"a process has at most {most / 1e6:.0f} MB, {anonymous / 1e6:.0f} MB of them anonymous"
    return time.perf_counter() - began, here.recv(), memory


def main(config: Config) -> None:
    check_unused(config.folder)
    config.folder.mkdir(parents=True, exist_ok=True)
    size = write_rows(config, config.folder / "rows.jsonl") / 1e6
    print(f"{size:.0f} MB, {config.processes} processes", flush=True)
    for _ in range(config.repeat):
        seconds, tokens = {}, {}
        for name, work in (("ours", ours), ("theirs", theirs)):
            shutil.rmtree(config.folder / name, ignore_errors=True)
            seconds[name], tokens[name], memory = measured(work, config)
            print(f"  {name:7} {seconds[name]:5.1f} s, {size / seconds[name]:5.2f} MB/s; {memory}", flush=True)
        assert len(set(tokens.values())) == 1, tokens
        print(f"  {seconds['theirs'] / seconds['ours']:.2f} times as fast, same {tokens['ours']:,} tokens", flush=True)
    for name, work in (("second start", second_start), ("reading all", read_all)):
        spent, found, memory = measured(work, config)
        print(f"  {name}: {found}; {spent:.1f} s with imports and tokenizer; {memory}", flush=True)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(filled(Config), description=__doc__))
