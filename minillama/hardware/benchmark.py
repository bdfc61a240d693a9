"""How fast this machine's processor computes in each dtype: measured once, and remembered for the runs to come."""

import hashlib
import json
import math
import os
import platform
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from minillama.files import cache_folder
from minillama.parallel.processes import on_rank_zero, warn

SHAPE = 128, 512, 1536
"""Tokens, hidden and intermediate size of what is measured: milliseconds even where it is slow, and large enough for the
ratio between dtypes that larger models have."""

SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_ENABLE_INSTRUCTIONS",
)
"""Environment variables that decide which instructions PyTorch and its libraries use."""

_unwritten: dict[Path, float] = {}
"""Measurements that no file could be made for, with which this process stays"""


def processor() -> dict[str, str]:
    """What tells this machine's processor from another: its model and a hash of its features, on any platform."""
    model, features = platform.processor() or platform.machine(), ""
    if platform.system() == "Linux":
        # x86 has a model name and flags, ARM has numbers and Features; one core stands for all
        kept = ("model name", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU variant", "CPU part")
        lines = []
        with suppress(OSError):  # without /proc the architecture must do
            lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        described = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        found = {name: described[name] for name in kept if name in described}
        model = found.get("model name", model)
        features = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    elif platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        model = subprocess.run(command, capture_output=True, text=True).stdout.strip() or model
    return {"processor": model, "features": features}


def remembered(what: str, measure: Callable[[], float], cache_dir: Path | None = None) -> float:
    """measure(), called once for this processor and version of PyTorch, by rank 0: later the answer is read from a file.

    So no two runs on this machine differ in what they choose by it. In a process group every rank must call it, and gets
    the same. A file that cannot be used is one warning, and so is a folder that cannot be written.
    """
    machine = processor() | {"torch": torch.__version__}
    machine |= {name: os.environ[name] for name in SETTINGS if name in os.environ}
    key = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder(cache_dir) / "measured" / f"{what}-{key}.json"

    def read() -> float | None:
        try:
            content = json.loads(file.read_text())
            if content["machine"] == machine and 0 < (rate := float(content["rate"])) < math.inf:
                return rate
            problem = f"was measured on {content['machine']}" if content["machine"] != machine else "holds no rate"
        except OSError:  # none yet; or one that cannot be read, of which the attempt to write tells
            return None
        except (ValueError, KeyError, TypeError) as error:
            problem = f"is damaged ({error!r})"
        warn(f"{file} {problem}: it is measured again")
        file.unlink(missing_ok=True)
        return None

    def answer() -> float:
        rate = _unwritten.get(file) or read()
        if rate is not None:
            return rate
        rate = measure()
        new = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps({"machine": machine, "rate": rate}, indent=2) + "\n")
            os.link(new, file)  # unlike a rename, it leaves the answer of another run that was quicker
        except FileExistsError:
            return read() or rate
        except OSError as error:
            if not any(other.parent == file.parent for other in _unwritten):
                problem = f"{file.parent} cannot be written ({error.strerror})"
                warn(f"{problem}: the next run measures this processor again, and may choose otherwise")
            _unwritten[file] = rate
        finally:
            with suppress(OSError):
                new.unlink()
        return rate

    return on_rank_zero(answer) if dist.is_initialized() else answer()


def training_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a linear layer's three products, y = x W^T, dx = dy W and dW = dy^T x, on one thread.

    All three, as they differ: bf16 without hardware for it has a usable y, and a dx many times slower (pytorch#146508).
    """
    tokens, hidden, intermediate = SHAPE
    shapes = ((tokens, hidden), (intermediate, hidden), (tokens, intermediate))
    x, weight, grad = (torch.full(shape, 0.5, dtype=dtype) for shape in shapes)  # no random numbers: the run's stay
    products = (lambda: x @ weight.T, lambda: grad @ weight, lambda: grad.T @ x)
    return 6 * tokens * hidden * intermediate / sum(fastest(product) for product in products)


def fastest(call: Callable[[], object]) -> float:
    """Seconds that call() takes on one thread: the least of many.

    Of the thread's own time: where other programs share the core, or a container's limit stops it, seconds of the clock
    are 20 times as many, and what is measured is remembered.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call()
        seconds: list[float] = []
        while len(seconds) < 20 and sum(seconds) < 0.15:
            start = time.thread_time()
            call()
            seconds.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return min(seconds)


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of a few: what this process could reach at most."""

    def seconds(n: int, count: int) -> float:
        generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay
        a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
        times = []
        for _ in range(count):
            start = time.perf_counter()
            product = a @ b
            product[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - start)
        return min(times)

    n = 8192
    if torch.device(device).type == "cpu":
        n = 128
        while n < 8192 and seconds(n, 3) < 0.002:  # a processor's cores and dtypes differ a hundredfold
            n *= 2
    return 2 * n**3 / seconds(n, 5)
