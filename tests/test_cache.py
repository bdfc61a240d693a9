"""What is built, when, by whom, and that every way to build it gives the same bytes."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import run_ranks
from test_datasets import Bytes, pieces, write

from minillama.data import cache
from minillama.data.batch import collate
from minillama.data.cache import open_packed, prepare, refused_rows
from minillama.data.datasets import DataConfig
from minillama.errors import UserError


class Strict(Bytes):
    """Refuses to encode: what it is asked for is there already."""

    def encode(self, text, *, bos=False, eos=False):
        raise AssertionError(f"encodes {text}")


class Counting(Bytes):
    """Writes a line for each row; slow enough for others to come along."""

    def __init__(self, log):
        self.log = log

    def encode(self, text, *, bos=False, eos=False):
        if eos:
            time.sleep(0.002)
            with self.log.open("a") as file:
                file.write("row\n")
        return super().encode(text, bos=bos, eos=eos)


def rows_file(path, count, start=0, bad=()):
    """Rows whose targets are their numbers; those in `bad` have none."""
    lines = [{"input": "x" * (k % 7), "target": "" if k in bad else str(k)} for k in range(start, start + count)]
    return write(path, "".join(json.dumps(line) + "\n" for line in lines))


def targets(packed):
    """The targets of the documents in packs, in order of the file."""
    numbers = np.searchsorted(packed.documents.offsets, packed.starts, "right") - 1
    return sorted(int(pieces(packed.documents[i])[1]) for i in numbers)


def contents(folder):
    """Names of all files in the cache but locks, with their content."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture
def config(tmp_path):
    return DataConfig("grammar", rows_file(tmp_path / "a.jsonl", 300), cache_dir=tmp_path / "cache", context_length=256)


def test_the_second_time_it_is_there(config, tmp_path):
    first = prepare(config, Bytes(), 1, validation=False)
    assert prepare(config, Strict(), 1, validation=False) == first
    copied = replace(config, path=write(tmp_path / "other.jsonl", config.path.read_bytes()))
    assert prepare(copied, Strict(), 1, validation=False) == first
    # documents are shared by all ways to pack them
    others = [
        prepare(replace(config, context_length=200), Strict(), 1, validation=False)[0],
        prepare(replace(config, batching="padding"), Strict(), 1, validation=False)[0],
        prepare(replace(config, too_long="split"), Strict(), 1, validation=False)[0],
        prepare(config, Strict(), 2, validation=False)[0],
        *prepare(replace(config, val_fraction=0.5), Strict(), 1, validation=True),
    ]
    assert len({first[0], *others}) == 7 and {folder.parent for folder in others} == {first[0].parent}


def test_what_decides_the_tokens_decides_the_folder(config, tmp_path):
    class Other(Bytes):
        fingerprint = "other"

    packed = prepare(config, Bytes(), 0, validation=False)[0]
    changed = rows_file(tmp_path / "b.jsonl", 300, start=1)
    folders = [
        prepare(config, Other(), 0, validation=False)[0],
        prepare(replace(config, path=changed), Bytes(), 0, validation=False)[0],
        prepare(replace(config, train_on="all"), Bytes(), 0, validation=False)[0],
        prepare(
            replace(config, columns=("input=target", "target=input"), bad_rows="skip"), Bytes(), 0, validation=False
        )[0],
    ]
    assert len({folder.parent for folder in [packed, *folders]}) == 5
    assert open_packed(folders[0]).fingerprint == open_packed(packed).fingerprint  # the same tokens after all
    assert len({open_packed(folder).fingerprint for folder in folders}) == 4


def test_everything_is_mapped_and_given_back(config):
    packed = open_packed(prepare(config, Bytes(), 0, validation=False)[0])
    for array in (packed.documents.tokens, packed.documents.trained, packed.starts, packed.lengths):
        assert isinstance(array.base, np.memmap) or isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    before = packed.documents.tokens.tolist()
    batch = collate(packed, [0, 1], 0, "cpu")
    packed.documents.release()
    assert packed.documents.tokens.tolist() == before
    assert collate(packed, [0, 1], 0, "cpu").tokens.equal(batch.tokens)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_any_number_of_processes_builds_the_same_bytes(config, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(cache, "LARGE", 0)
    monkeypatch.setattr(cache, "CHUNK_ROWS", 7)
    rows = [json.loads(line) for line in rows_file(tmp_path / "b", 300, bad=(3, 50, 51, 299)).read_text().splitlines()]
    if kind == ".json":
        text = json.dumps(rows)
    elif kind == ".csv":
        text = "input,target\n" + "".join(f"{row['input']},{row['target']}\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    config = replace(config, path=write(tmp_path / f"b{kind}", text), bad_rows="skip")
    found = []
    for processes in (1, 2, 5):
        folder, _ = prepare(
            replace(config, cache_dir=tmp_path / str(processes)), Bytes(), 0, validation=False, processes=processes
        )
        found.append(contents(tmp_path / str(processes)))
        assert open_packed(folder).documents.refused == 4 and len(refused_rows(folder)) == 4
        assert refused_rows(folder)[1].startswith(str(config.path)) and "'target' is empty" in refused_rows(folder)[1]
        assert targets(open_packed(folder)) == [k for k in range(300) if k not in (3, 50, 51, 299)]
    assert found[0] == found[1] == found[2] and len(found[0]) == 10


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_first_bad_row_ends_it(config, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(cache, "LARGE", 0)
    monkeypatch.setattr(cache, "CHUNK_ROWS", 7)
    path = rows_file(tmp_path / "b.jsonl", 300, bad=(100, 109, 250))
    with pytest.raises(UserError, match=r"b\.jsonl, line 101: field 'target' is empty"):
        prepare(replace(config, path=path), Bytes(), 0, validation=False, processes=processes)
    write(path, path.read_bytes().replace(b'"120"', b'"12'))
    with pytest.raises(UserError, match=r"line 101:"):
        prepare(replace(config, path=path), Bytes(), 0, validation=False, processes=processes)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


def test_no_row_at_all_can_be_used(config, tmp_path):
    path = rows_file(tmp_path / "b.jsonl", 3, bad=(0, 1, 2))
    with pytest.raises(UserError, match=r"b\.jsonl: no row can be used; the first: .*line 1: field 'target' is empty"):
        prepare(replace(config, path=path, bad_rows="skip"), Bytes(), 0, validation=False)


def test_rows_that_were_skipped_are_errors_where_they_must_not_be(config, tmp_path):
    config = replace(config, path=rows_file(tmp_path / "b.jsonl", 5, bad=(2, 3)), bad_rows="skip")
    folder, _ = prepare(config, Bytes(), 0, validation=False)
    with pytest.raises(UserError, match=r"b\.jsonl, line 3: field 'target' is empty"):
        prepare(replace(config, bad_rows="error"), Strict(), 0, validation=False)
    write(config.path, rows_file(tmp_path / "c.jsonl", 5).read_bytes())
    fine, _ = prepare(replace(config, bad_rows="error"), Bytes(), 0, validation=False)
    assert prepare(config, Strict(), 0, validation=False)[0] == fine != folder


def in_processes(count, target, *args):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=args) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def test_of_many_runs_that_come_at_once_one_builds(config, tmp_path):
    log = tmp_path / "log"
    processes = in_processes(4, lambda: prepare(config, Counting(log), 0, validation=False))
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text().count("row") == 300
    assert targets(open_packed(prepare(config, Strict(), 0, validation=False)[0])) == list(range(300))


def test_a_builder_that_is_killed_leaves_nothing_in_the_way(config, tmp_path):
    log = tmp_path / "log"
    (process,) = in_processes(1, lambda: prepare(config, Counting(log), 0, validation=False))
    while not log.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list((tmp_path / "cache").glob("*.part"))) == 1
    folder, _ = prepare(config, Bytes(), 0, validation=False)
    assert not list((tmp_path / "cache").glob("*.part")) and targets(open_packed(folder)) == list(range(300))


class Dying(Bytes):
    def encode(self, text, *, bos=False, eos=False):
        if text == "200":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text, bos=bos, eos=eos)


def test_a_process_that_dies_while_it_tokenizes(config, monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 0)
    with pytest.raises(UserError, match=r"a process that tokenizes has died.*--data\.workers"):
        prepare(config, Dying(), 0, validation=False, processes=2)


def test_damaged_and_unwritable(config, tmp_path):
    folder, _ = prepare(config, Bytes(), 0, validation=False)
    for file in (folder / "starts.bin", folder.parent / "tokens.bin", folder.parent / "about.json"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-8])
        with pytest.raises(UserError, match=f"{file.parent} is damaged .* remove it"):
            open_packed(folder)
        file.write_bytes(whole)
    assert len(open_packed(folder)) > 1
    with pytest.raises(UserError, match=r"a\.jsonl.* cannot be written .*--data\.cache-dir"):
        prepare(replace(config, cache_dir=config.path / "sub"), Bytes(), 0, validation=False)


def test_held_out_rows_are_chosen_at_random_and_once(config):
    def parts(seed, **flags):
        return [targets(open_packed(f)) for f in prepare(replace(config, **flags), Bytes(), seed, validation=True)]

    train, validation = parts(1, val_fraction=0.2)
    assert len(validation) == 60 and sorted(train + validation) == list(range(300))
    assert 100 < np.mean(validation) < 200
    assert parts(1, val_fraction=0.2, batching="padding", context_length=100) == [train, validation]
    assert parts(2, val_fraction=0.2) != [train, validation]
    for fraction, what in ((0.001, "to evaluate on, leaves none there"), (0.999, "leaves none to train on")):
        with pytest.raises(UserError, match=rf"of 300 rows {fraction}.*{what}"):
            parts(1, val_fraction=fraction)
    with pytest.raises(UserError, match="exclude each other"):
        DataConfig(val_fraction=0.1, val_path=Path("a.jsonl"))


def test_a_mixture_has_each_source_as_often_as_it_says(config, tmp_path):
    rows_file(tmp_path / "b.jsonl", 100, start=1000)
    samsum = [{"dialog": "a", "summary": f"{k}"} for k in range(2000, 2040)]
    write(tmp_path / "c.json", json.dumps(samsum))
    mixture = write(
        tmp_path / "mixture.json",
        json.dumps(
            [
                {"dataset": "grammar", "path": "a.jsonl"},
                {"dataset": "grammar", "path": str(tmp_path / "b.jsonl"), "weight": 0.25},
                {"dataset": "samsum", "path": "c.json", "weight": 2.5, "columns": {"dialogue": "dialog"}},
            ]
        ),
    )
    config = replace(config, path=None, mixture=mixture, context_length=1024)
    packed = open_packed(prepare(config, Bytes(), 0, validation=False)[0])
    found = targets(packed)
    assert found[:300] == list(range(300))
    quarter = [k for k in found if 1000 <= k < 2000]
    assert len(set(quarter)) == len(quarter) == 25
    counts = np.bincount(found)[2000:]
    assert sorted(counts) == [2] * 20 + [3] * 20
    # sources meet in packs
    numbers = np.searchsorted(packed.documents.offsets, packed.starts, "right") - 1
    sources = [
        set(np.digitize(numbers[a:b], (300, 400))) for a, b in zip(packed.firsts[:-1], packed.firsts[1:], strict=True)
    ]
    assert sum(len(found) > 1 for found in sources) > len(sources) / 2

    train, validation = prepare(replace(config, val_fraction=0.1), Bytes(), 0, validation=True)
    held_out = targets(open_packed(validation))
    assert len(held_out) == len(set(held_out)) == 30 + 10 + 4  # of each source, and each once
    assert not set(held_out) & set(targets(open_packed(train)))


BAD_MIXTURES = [
    ("{}", "must be a list of sources, found {}"),
    ("[]", r"must be a list of sources, found \[\]"),
    ("[1]", "source 1: needs 'dataset'"),
    ('[{"dataset": "samsum"}, {"path": "a"}]', "source 2: needs 'dataset'"),
    ('[{"dataset": "samsum", "wieght": 1}]', "source 1: needs 'dataset', and may have .*'weight'"),
    ('[{"dataset": "samsum", "weight": 0}]', "source 1: weight must be above 0 and below 1000, found 0"),
    ('[{"dataset": "samsum", "weight": "2"}]', 'source 1: weight must be a number, found "2"'),
    ('[{"dataset": "poems"}]', "source 1: --data.dataset poems is unknown"),
    ('[{"dataset": "samsum", "columns": {"a": "b"}}]', "samsum has no field a, only dialogue, summary"),
    ('[{"dataset": "samsum", "path": "none.json"}]', "none.json does not exist"),
    ("[", "cannot be read"),
]


@pytest.mark.parametrize("text, message", BAD_MIXTURES)
def test_bad_mixtures(tmp_path, text, message):
    config = DataConfig(mixture=write(tmp_path / "m.json", text), cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        prepare(config, Bytes(), 0, validation=False)


def test_mixtures_and_what_else_is_given(tmp_path):
    mixture = write(tmp_path / "m.json", '[{"dataset": "samsum"}]')
    with pytest.raises(UserError, match=r"--data\.mixture and --data\.path exclude each other"):
        DataConfig(mixture=mixture, path=mixture)
    with pytest.raises(UserError, match=r"m\.json is given without rows to evaluate on: .*--data\.val-fraction"):
        prepare(DataConfig(mixture=mixture, cache_dir=tmp_path), Bytes(), 0, validation=True)


def test_long_rows_by_their_format(tmp_path):
    write(tmp_path / "book.txt", "word " * 100)
    write(tmp_path / "a.json", json.dumps([{"input": "a", "target": "b" * 300}, {"input": "a", "target": "b"}]))
    mixture = [{"dataset": "text", "path": "book.txt"}, {"dataset": "grammar", "path": "a.json"}]
    write(tmp_path / "m.json", json.dumps(mixture))
    config = DataConfig(mixture=tmp_path / "m.json", context_length=100, cache_dir=tmp_path / "cache")
    expected = {"auto": (1, 0, 1), "drop": (2, 0, 0), "truncate": (0, 2, 0), "split": (0, 0, 2)}
    for too_long, (dropped, truncated, split) in expected.items():
        packed = open_packed(prepare(replace(config, too_long=too_long), Bytes(), 0, validation=False)[0])
        assert packed.long == {"dropped": dropped, "truncated": truncated, "split": split, "untrained": 0}
    padded = open_packed(prepare(replace(config, batching="padding"), Bytes(), 0, validation=False)[0])
    assert padded.long == {"dropped": 0, "truncated": 1, "split": 1, "untrained": 0}


def on_two_nodes(mesh, folder):
    """Four ranks, two a machine; what each is told, and who worked."""
    from minillama.parallel.processes import on_each_node

    rank = mesh.get_rank()
    os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}

    def work():
        (folder / f"worked{rank}").touch()
        return f"of {rank}"

    def fail():
        if rank == 2:
            raise UserError("the disk of the second machine")
        return 1

    told = on_each_node(work)
    try:
        on_each_node(fail)
    except UserError as error:
        return told, str(error)


def test_one_process_of_each_machine_builds(tmp_path):
    message = "the disk of the second machine"
    expected = [("of 0", message), ("of 0", message), ("of 2", message), ("of 2", message)]
    assert run_ranks(on_two_nodes, 4, tmp_path) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["worked0", "worked2"]
