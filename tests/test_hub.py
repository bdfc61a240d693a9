"""The Hugging Face hub, beside a server of this file that speaks its protocol: what is asked of it, and what is said."""

import hashlib
import json
import os
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import random_model, run_ranks, run_script, save_folder

from minillama.errors import UserError
from minillama.formats.hub import find_model, model_name

ROOT = Path(__file__).parents[1]
DOWNLOAD, LORA = ROOT / "tools" / "download.py", ROOT / "recipes" / "lora_fsdp.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 10 * 2**20  # what huggingface_hub writes at a time: of less, nothing is left when a connection breaks


@dataclass
class Hub:
    """What the server has, how it misbehaves, and what it was asked for."""

    repos: dict[str, dict[str, bytes]]
    url: str = ""
    cut: int = 0
    """Bytes of a large file after which the connection breaks, once"""
    refusals: int = 0
    """How many requests for a large file are refused after that"""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range) of each request for a file or about a repository"""
    leaked: bool = False
    """Whether a token came to the host of the large files"""

    def files(self) -> list[str]:
        """Those of which content was asked for, in any order."""
        return sorted(
            path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/api/" not in path
        )

    def ranges(self) -> list[str | None]:
        return [span for method, path, span in self.asked if method == "GET" and path.startswith("/large/")]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pth", ".gguf"))


def described(name: str, content: bytes) -> dict:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"path": name, "rfilename": name, "type": "file", "size": len(content), "oid": git, "blobId": git}
    if is_large(name):
        sha = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha, "sha256": sha, "size": len(content), "pointerSize": 134}
    return entry


@pytest.fixture(scope="module")
def server():
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, headers=(), body=b"", cut=0):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **dict(headers)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: cut or len(body)])
            if cut:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            hub, path = self.server.hub, unquote(urlsplit(self.path).path)
            if path == "/api/agent-harnesses":  # huggingface_hub's own affair
                return self.answer(404)
            hub.asked.append((self.command, path, self.headers["Range"]))
            if path.startswith("/large/"):
                return self.large(hub, path)
            api, _, repo, rest = re.fullmatch(r"(/api/models)?(/)([^/]+/[^/]+)/(.*)", path).groups()
            files = hub.repos.get(repo)
            if files is None:
                return self.answer(
                    401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}
                )
            if self.headers["Authorization"] == "Bearer hf_wrong":
                return self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            kind, revision, *name = rest.split("/", 2)
            if revision not in ("main", COMMIT):
                return self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            if api:
                listed = [described(*item) for item in files.items()]
                content = {"id": repo, "sha": COMMIT, "siblings": listed} if kind == "revision" else listed
                return self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())
            if repo == "org/gated" and self.headers["Authorization"] != "Bearer hf_right":
                return self.answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            [name], content = name, files[name[0]]
            entry, headers = described(name, content), {"X-Repo-Commit": COMMIT}
            if not is_large(name):
                return self.answer(200, headers | {"ETag": f'"{entry["oid"]}"'}, content)
            where = (
                hub.url.replace("127.0.0.1", "localhost") + f"/large/{repo}/{name}"
            )  # another host, as the hub's CDN
            headers |= {"X-Linked-ETag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": len(content), "Location": where}
            return self.answer(302, headers)

        def large(self, hub, path):
            hub.leaked |= "Authorization" in self.headers
            if hub.refusals and not hub.cut:
                hub.refusals -= 1
                return self.answer(503)
            _, _, org, repo, name = path.split("/")
            content, start, cut = hub.repos[f"{org}/{repo}"][name], 0, 0
            headers = {"ETag": '"x"', "Accept-Ranges": "bytes"}
            if self.headers["Range"]:
                start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if hub.cut and len(content) > hub.cut:
                cut, hub.cut = hub.cut, 0
            self.answer(206 if start else 200, headers, content[start:], cut)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http
        http.shutdown()


@pytest.fixture
def hub(server, tiny_folder):
    """org/tiny with all that a repository may hold; the same gated; more in the tests."""
    tiny = {file.name: file.read_bytes() for file in tiny_folder.iterdir()}
    unused = (
        "README.md",
        "pytorch_model.bin",
        "model.gguf",
        "onnx/model.onnx",
        "adapter_model.safetensors",
        "tf_model.h5",
    )
    others = dict.fromkeys((*unused, "consolidated.00.pth", "params.json"), b"?")
    more = {"original/tokenizer.model": tiny["tokenizer.model"], "generation_config.json": b"{}", **others}
    http = f"http://127.0.0.1:{server.server_address[1]}"
    server.hub = Hub({"org/tiny": tiny | more, "org/gated": tiny}, http)
    return server.hub


@pytest.fixture
def env(hub, tmp_path):
    """Of a process that asks this server and no other."""
    home = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return home | {"HF_TOKEN": "", "HF_HUB_DISABLE_TELEMETRY": "1"}


NEEDED = {"config.json", "generation_config.json", "model.safetensors", "params.json", "tokenizer.model"}


def find(mesh, env, *models):
    """What find_model gives for each in a process group: the folder, or its UserError's text."""
    os.environ |= env
    found = []
    for model in models:
        try:
            found.append(str(find_model(model)))
        except UserError as error:
            found.append(f"error: {error}")
    return found


def test_two_ranks_download_once_what_is_needed_and_are_told_the_same(hub, env, tiny_folder):
    first, second = run_ranks(find, 2, env, "org/tiny", "org/tiny", "org/none", "org/gated")
    assert first == second
    assert set(hub.files()) == NEEDED and len(hub.ranges()) == 1
    assert sum("/api/models/org/tiny/revision" in path for _, path, _ in hub.asked) == 2  # the second time nothing else
    folder = Path(first[0])
    assert first[1] == first[0] and model_name(folder) == "org/tiny"
    assert (folder / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
    assert first[2].startswith(f"error: there is no folder org/none here, and no repository {hub.url}/org/none that")
    assert (
        first[3].startswith(f"error: {hub.url}/org/gated is gated: accept its licence") and "hf auth login" in first[3]
    )

    hub.asked.clear()
    [[again, new]] = run_ranks(find, 1, env | {"HF_HUB_OFFLINE": "1"}, "org/tiny", "org/gated")
    assert again == first[0] and not hub.asked
    assert "HF_HUB_OFFLINE is set" in new
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    [[again, new]] = run_ranks(find, 1, env | unreachable, "org/tiny", "org/other")
    assert again == first[0] and "http://127.0.0.1:1/org/other cannot be asked (ConnectError" in new

    [[allowed]] = run_ranks(find, 1, env | {"HF_TOKEN": "hf_right"}, "org/gated")
    assert model_name(Path(allowed)) == "org/gated" and not hub.leaked
    [[refused]] = run_ranks(find, 1, env | {"HF_TOKEN": "hf_wrong", "HF_HOME": env["HF_HOME"] + "2"}, "org/tiny")
    assert refused.startswith(
        f"error: {hub.url}/org/tiny refuses the token (Invalid credentials in Authorization header): log"
    )


def test_what_a_repository_may_hold(hub, env, tiny_folder):
    tiny = hub.repos["org/gated"]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    shards = {
        "model-1.safetensors": b"1",
        "model-2.safetensors": b"2",
        "model.safetensors.index.json": json.dumps(index),
    }
    unused = {"consolidated.safetensors": b"3", "model.fp16.safetensors": b"4"}
    whole = {name: value if isinstance(value, bytes) else value.encode() for name, value in (shards | unused).items()}
    meta = {"params.json": b"{}", "consolidated.00.pth": b"5", "consolidated.01.pth": b"6", "tokenizer.model": b"7"}
    other = json.dumps({"model_type": "gpt2"}).encode()
    hub.repos |= {
        "org/sharded": {"config.json": tiny["config.json"], **whole},
        "org/both": {"config.json": tiny["config.json"], **whole, "model.safetensors": tiny["model.safetensors"]},
        "org/meta": meta | {"checklist.chk": b"", "original/consolidated.00.pth": b"8"},
        "org/pickled": {"config.json": tiny["config.json"], "pytorch_model.bin": b"9"},
        "org/gguf": {"model.gguf": b"10", "README.md": b""},
        "org/gpt2": {"config.json": other, "model.safetensors": b"11"},
    }
    [found] = run_ranks(find, 1, env, "org/sharded", "org/meta", "org/pickled", "org/gguf", "org/gpt2", "org/a--b")
    assert {file.name for file in Path(found[0]).iterdir()} == {"config.json", *shards}
    assert {file.name for file in Path(found[1]).iterdir()} == meta.keys()
    assert found[2].startswith("error: org/pickled has neither *.safetensors")
    assert found[3].startswith("error: org/gguf holds no model")
    assert "error: " in found[4] and "gpt2" in found[4]
    assert found[5] == "org/a--b"  # no name that the hub has
    assert not {"consolidated.safetensors", "pytorch_model.bin"} & set(hub.files())
    assert not any("org/gpt2/model.safetensors" in path for _, path, _ in hub.asked)
    [[both]] = run_ranks(find, 1, env, "org/both")
    small = {"config.json", "model.safetensors.index.json"}
    assert {file.name for file in Path(both).iterdir()} == {*small, "model.safetensors"}  # the shards are not read


def test_when_a_connection_breaks_only_that_file_starts_from_scratch(hub, env):
    large = os.urandom(2 * CHUNK + 5)
    hub.repos["org/large"] = hub.repos["org/gated"] | {"model.safetensors": large}
    hub.cut, hub.refusals = CHUNK + 7, 1
    [[failed, folder]] = run_ranks(find, 1, env, "org/large", "org/large")
    assert failed.startswith("error: org/large could not be downloaded (HfHubHTTPError: Server error '503")
    assert hub.ranges() == [None, f"bytes={CHUNK}-", None]  # huggingface_hub goes on within a call, and not in the next
    assert len(hub.files()) == 2 + 3 and (Path(folder) / "model.safetensors").read_bytes() == large


def in_two_places(mesh, env, here, there):
    os.environ |= env | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # two machines
    os.chdir(here if mesh.get_rank() == 0 else there)
    return find(mesh, {}, "org/tiny")


def test_machines_with_different_models_are_told(hub, env, tmp_path, tiny_folder):
    save_folder(random_model(), tmp_path / "here" / "org" / "tiny")
    (tmp_path / "there").mkdir()
    first, second = run_ranks(in_two_places, 2, env, tmp_path / "here", tmp_path / "there")
    said = f"the machines have different versions of org/tiny: {COMMIT}, tiny; give all of them the same folder"
    assert first == second == [f"error: {said}"]


def find_here(mesh, env, folder, *models):
    os.chdir(folder)
    return find(mesh, env, *models), "huggingface_hub" in sys.modules


def test_a_local_path_asks_nobody(hub, env, tmp_path):
    folder = save_folder(random_model(), tmp_path / "org" / "tiny")
    local = [
        str(folder),
        "org/tiny",
        "org/typo",
        "org/tiny/",
        "../org/none",
        "a/b/c",
        "/nowhere/a",
        "one",
        ".a/b",
        "a/b.git",
    ]
    [(found, imported)] = run_ranks(find_here, 1, env, tmp_path, *local)
    assert found == [path.rstrip("/") for path in local] and not imported and not hub.asked
    assert model_name(folder) == str(folder)


def test_a_recipe_trains_a_model_of_the_hub(hub, env, tmp_path):
    flags = ["--output-dir", tmp_path / "out", "--device", "cpu", "--data.context-length", 512, "--train.max-steps", 1]
    flags += ["--eval.no-enabled", "--fsdp.precision", "fp32"]
    codes, text = run_script(LORA, "--model", "org/tiny", *flags, log=tmp_path / "log", env=env)
    assert codes == [0], text
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["flags"]["model"] == "org/tiny" and run["model_folder"].endswith(
        f"/models--org--tiny/snapshots/{COMMIT}"
    )
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/tiny"


# --- tools/download.py


@pytest.fixture
def download(env, tmp_path):
    def call(repo, *flags, target="model", **more):
        codes, text = run_script(DOWNLOAD, repo, tmp_path / target, *flags, log=tmp_path / "log", env=env | more)
        return codes[0], text, tmp_path / target

    return call


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_folder_of_its_own(hub, download):
    code, text, folder = download("org/tiny")
    needed = {*NEEDED, "original/tokenizer.model"}
    assert code == 0 and contents(folder) == {name: hub.repos["org/tiny"][name] for name in needed}, text
    assert f"org/tiny at {COMMIT}" in text and f"next: python recipes/lora_fsdp.py --model {folder}" in text
    assert set(hub.files()) == NEEDED
    hub.asked.clear()
    code, text, _ = download("org/tiny")
    assert code == 0 and "complete already" in text and not hub.files()
    (folder / "model.safetensors").write_bytes(b"?")
    code, text, _ = download("org/tiny")
    assert (
        code == 1
        and text == f"error: {folder} exists, and its model.safetensors is not that of org/tiny: name another target\n"
    )


def test_the_same_command_goes_on_at_the_byte_where_it_stopped(hub, download):
    large = os.urandom(2 * CHUNK + 5)
    hub.repos["org/large"] = hub.repos["org/gated"] | {"model.safetensors": large}
    hub.cut, hub.refusals = CHUNK + 7, 1
    code, text, folder = download("org/large")
    assert code == 1 and text.count("error: ") == 1 and "org/large could not be downloaded" in text, text
    [part] = folder.with_name("model.download").glob("*.part")
    assert not folder.exists() and part.read_bytes() == large[:CHUNK]

    hub.asked.clear()
    code, text, folder = download("org/large")
    assert code == 0 and hub.ranges() == [f"bytes={CHUNK}-"] and set(hub.files()) == {"model.safetensors"}, text
    assert contents(folder) == hub.repos["org/large"]


def test_what_is_there_already_is_believed_only_if_it_has_the_hash(hub, download, tmp_path):
    tiny = hub.repos["org/gated"]
    partial = tmp_path / "model.download"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(bytes(len(tiny["model.safetensors"])))  # of another revision
    (partial / "config.json").write_bytes(tiny["config.json"])
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"?")
    git = described("tokenizer.model", tiny["tokenizer.model"])["blobId"]
    (partial / f"tokenizer.model.{git[:12]}.part").write_bytes(b"?" * len(tiny["tokenizer.model"]))
    code, text, folder = download("org/gated", HF_TOKEN="hf_right")
    assert code == 1 and "tokenizer.model came with another hash than the hub's" in text
    code, text, folder = download("org/gated", HF_TOKEN="hf_right")
    assert code == 0 and contents(folder) == tiny and "config.json" not in hub.files() and not hub.leaked, text


def test_what_cannot_be_had_is_said_once(hub, download, env, tmp_path):
    cases = {
        ("org/gated",): f"{hub.url}/org/gated is gated: accept its licence on that page, then log in",
        ("org/tiny", "--revision", "v9"): f"{hub.url}/org/tiny has no revision v9",
        ("tiny",): "tiny is not ORG/NAME",
    }
    for flags, said in cases.items():
        code, text, folder = download(*flags)
        assert code == 1 and text.startswith(f"error: {said}") and text.count("\n") == 1, text
        assert not folder.exists()
