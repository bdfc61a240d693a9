"""A checkpoint's index: what DCP's own says, in a form that runs no code; an untrusted one is refused, whatever it holds."""

import json
import pickle
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import run_ranks
from test_checkpoint import found, make_two, training

from minillama.errors import UserError
from minillama.training.checkpoint_index import INDEX, read_index
from minillama.training.resume import MANIFEST, described, hash_of, read_manifest

TOOL = Path(__file__).parents[1] / "tools/convert_checkpoint.py"


@pytest.fixture(scope="module")
def checkpoint(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved")
    run_ranks(make_two, 2, tiny_folder, out)
    return out / "sharded/checkpoints/step-00000002"


@pytest.fixture
def copied(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoints" / checkpoint.name))


def forge(folder, name, content):
    """Changes a file, and the hashes with it, as the author of a checkpoint can."""
    (folder / name).write_bytes(content)
    mark = json.loads((folder / MANIFEST).read_text())
    del mark["sha256"]
    mark["files"][name] = described(folder / name)
    (folder / MANIFEST).write_text(json.dumps(mark | {"sha256": hash_of(mark)}))


def test_it_says_what_dcps_own_says(checkpoint):
    ours, theirs = read_index(checkpoint), dcp.FileSystemReader(checkpoint).read_metadata()
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, tensor in theirs.state_dict_metadata.items():
        own = ours.state_dict_metadata[name]
        assert (own.size, own.properties.dtype) == (tensor.size, tensor.properties.dtype)
        assert sorted(own.chunks, key=str) == sorted((c for c in tensor.chunks if 0 not in c.sizes), key=str)
    places = {key: place for key, place in theirs.storage_data.items() if key in ours.storage_data}
    assert places == ours.storage_data
    kinds = {len(tensor.chunks) for tensor in ours.state_dict_metadata.values()}
    assert kinds == {1, 2} and any(not tensor.size for tensor in ours.state_dict_metadata.values())


def harmful(harm):
    """A pickle that makes a folder by a dotted name in a module of DCP's, which a check of modules alone lets through."""

    def text(value):
        return b"\x8c" + bytes([len(value)]) + value.encode()

    module, name = text("torch.distributed.checkpoint.filesystem"), text("os.mkdir")
    return b"\x80\x04" + module + name + b"\x93" + text(str(harm)) + b"\x85R."


def load(mesh, folder, checkpoint, out):
    run = training(folder, out)
    with run.checkpoints(found(checkpoint.parents[1])) as checkpoints:
        return run.state(checkpoints)


def test_a_pickle_in_its_place_is_not_even_read(tiny_folder, checkpoint, copied, tmp_path):
    harm = tmp_path / "harm"
    forge(copied, ".metadata", harmful(harm))
    [expected] = run_ranks(load, 1, tiny_folder, checkpoint, tmp_path / "new")
    [loaded] = run_ranks(load, 1, tiny_folder, copied, tmp_path / "new")
    assert expected.keys() == loaded.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)
    assert not harm.exists()
    pickle.loads((copied / ".metadata").read_bytes())
    assert harm.exists()  # it would have


def changed(change):
    def make(index):
        name = next(name for name, entry in index.items() if len(entry["parts"]) == 2)
        change(index[name], index[name]["parts"])
        return index

    return make


BAD = {
    "not JSON": lambda index: "{",
    "a list": lambda index: [index],
    "deep": lambda index: "[" * 200_000,
    "no parts": changed(lambda entry, parts: entry.pop("parts")),
    "bytes, which DCP would unpickle": changed(lambda entry, parts: (entry.clear(), entry.update(type="bytes"))),
    "dtype": changed(lambda entry, parts: entry.update(dtype="os")),
    "negative": changed(lambda entry, parts: entry.update(shape=[-1, *entry["shape"][1:]])),
    "huge": changed(lambda entry, parts: entry.update(shape=[2**70])),
    "a row missing": changed(lambda entry, parts: parts.pop()),
    "a row twice": changed(lambda entry, parts: parts.append(parts[0])),
    "text": changed(lambda entry, parts: parts[0].__setitem__(1, "4")),
    "path": changed(lambda entry, parts: parts[0].__setitem__(2, "../step-00000001/__0_0.distcp")),
    "absolute": changed(lambda entry, parts: parts[0].__setitem__(2, "/etc/passwd")),
    "another file": changed(lambda entry, parts: parts[0].__setitem__(2, MANIFEST)),
    "beyond its end": changed(lambda entry, parts: parts[0].__setitem__(4, 10**9)),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_wrong_index_is_one_message_in_the_tool(copied, tmp_path, monkeypatch, capsys, change):
    index = change(json.loads((copied / INDEX).read_text()))
    forge(copied, INDEX, (index if isinstance(index, str) else json.dumps(index)).encode())
    with pytest.raises(UserError, match=INDEX):
        read_index(copied)
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", str(copied), str(tmp_path / "target")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith(f"error: {copied / INDEX}") and said.count("\n") == 1
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/../x"])
def test_file_names_stay_in_the_folder(copied, name):
    mark = json.loads((copied / MANIFEST).read_text())
    del mark["sha256"]
    mark["files"][name] = {"bytes": 1, "sha256": ""}
    (copied / MANIFEST).write_text(json.dumps(mark | {"sha256": hash_of(mark)}))
    with pytest.raises(UserError, match="files outside the folder are not read"):
        read_manifest(copied)
