"""Small real things to test on: random Llamas as Hugging Face folders, a byte tokenizer, processes that talk over gloo."""

import base64
import contextlib
import json
import multiprocessing
import os
import pickle
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: as many tests run at a time as there are cores

import pytest
import torch
from safetensors.torch import save_file

from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama

os.environ["HF_HUB_OFFLINE"] = "1"  # peft and transformers, the references, look no name up
if "MINILLAMA_TEST_CACHE" not in os.environ:  # one for all processes: what is measured there stays the same
    _cache = tempfile.TemporaryDirectory()
    os.environ["MINILLAMA_TEST_CACHE"] = os.environ["XDG_CACHE_HOME"] = os.environ["HF_DATASETS_CACHE"] = _cache.name

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def random_model(seed: int = 0, **changes: Any) -> Llama:
    """A Llama with weights large enough for its outputs to depend on all of them."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig.from_dict(TINY | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    return model.eval()


def save_folder(model: Llama, folder: Path, **changes: Any) -> Path:
    """Writes config.json and model.safetensors as transformers would, and a tokenizer of 256 bytes + 256 special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(random_model(), tmp_path_factory.mktemp("tiny"))


# Children fork from a server that has made the imports of preload.py: seconds saved at each start.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preload"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """function(1-D mesh, *args) in `world_size` processes on gloo; what each returned. Fails if one fails or hangs."""
    results = _processes(_call_with_mesh, world_size, function, args)
    problems = [value for kind, value in results if kind != "ok"]
    assert not problems, "\n".join(map(str, problems))
    return [value for _, value in results]


def run_script(
    script: Path, *args: Any, world_size: int = 1, log: Path, env: dict[str, str] | None = None
) -> tuple[list[int], str]:
    """The script with these flags, as torchrun would start it: exit code of each rank, and what all of them printed."""
    return start_script(script, *args, world_size=world_size, log=log, env=env)[1]()


def start_script(
    script: Path, *args: Any, world_size: int = 1, log: Path, env: dict[str, str] | None = None
) -> tuple[list[Any], Callable[[], tuple[list[int], str]]]:
    """run_script in the background: its processes, and a function that waits for them and returns what run_script does."""
    log.unlink(missing_ok=True)
    processes, wait = _start(_call_script, world_size, script, [str(a) for a in args], log, env or {})
    return processes, lambda: ([value for _, value in wait()], log.read_text())


def _processes(target: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    return _start(target, world_size, *args)[1]()


def _start(target: Callable[..., Any], world_size: int, *args: Any) -> tuple[list[Any], Callable[[], list[Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # where the server finds preload.py
        forkserver.ensure_running()
    # Bound, but not listening, until the processes have ended: no other socket is given this port meanwhile.
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as PyTorch's store sets it, which listens there
    reserved.bind(("127.0.0.1", 0))
    port = reserved.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        here, there = _context.Pipe(duplex=False)
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = _context.Process(target=_child, args=(env, there, target, args))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)

    def wait() -> list[Any]:
        try:
            results = []
            for pipe in pipes:
                assert pipe.poll(120), "a rank hangs"
                try:
                    results.append(pickle.loads(pipe.recv_bytes()))
                except EOFError:
                    results.append(("died", None))
        finally:
            for process in processes:
                process.join(10)
                process.kill()
            reserved.close()
        return results

    return processes, wait


def _child(env: dict[str, str], pipe: Any, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= env
    torch.set_num_threads(1)
    try:
        result = ("ok", target(*args))
    except BaseException:
        result = ("failed", traceback.format_exc())
    pipe.send_bytes(pickle.dumps(result))  # by value: send() would share the memory of a process about to end


def _call_with_mesh(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    from minillama.parallel.processes import process_group
    from minillama.parallel.sharding import FsdpConfig, make_mesh

    with process_group("cpu") as device:
        result = function(make_mesh(FsdpConfig(strategy="full-shard"), device), *args)
        with contextlib.suppress(RuntimeError):  # a rank that the test has killed
            torch.distributed.barrier()  # rank 0 keeps the store, which others may still need to make a group
        return result


def _call_script(script: Path, args: list[str], log: Path, env: dict[str, str]) -> int:
    os.environ |= env
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True, write_through=False)  # ranks write whole lines into the log
    sys.argv = [str(script), *args]
    try:
        runpy.run_path(str(script), run_name="__main__")
        return 0
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole-matrix", action="store_true", help="every combination in test_matrix.py, not a choice")
