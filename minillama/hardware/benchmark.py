"""How fast this machine's processor computes in each dtype: measured once, and cached for later runs."""

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
"""Tokens, hidden and intermediate size of what is measured: it takes milliseconds even on slow processors, and the ratio
between dtypes is that of larger models."""

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
"""Measurements that could not be written to a file; this process keeps using them"""


def processor() -> dict[str, str]:
    """Identifies this machine's processor: its model and a hash of its features, on any platform."""
    model, features = platform.processor() or platform.machine(), ""
    if platform.system() == "Linux":
        # x86 has a model name and flags, ARM has numbers and Features; one core represents all
        kept = ("model name", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU variant", "CPU part")
        lines = []
        with suppress(OSError):  # without /proc: the architecture
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
    """measure(), called once for this processor and version of PyTorch, by rank 0; later the result is read from a file.

    So all runs on this machine make the same choices. In a process group every rank must call it, and gets the same
    result. A file that cannot be used gives one warning, and so does a folder that cannot be written.
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
        except OSError:  # none yet; or it cannot be read, and then the attempt to write warns
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
            os.link(new, file)  # unlike a rename, it keeps the result of another run that was faster
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

    All three, because they differ: without bf16 hardware y is usable, but dx is many times slower (pytorch#146508).
    """
    tokens, hidden, intermediate = SHAPE
    shapes = ((tokens, hidden), (intermediate, hidden), (tokens, intermediate))
    # no random numbers: the run's generator stays as it is
    x, weight, grad = (torch.full(shape, 0.5, dtype=dtype) for shape in shapes)
    products = (lambda: x @ weight.T, lambda: grad @ weight, lambda: grad.T @ x)
    return 6 * tokens * hidden * intermediate / sum(fastest(product) for product in products)


def fastest(call: Callable[[], object]) -> float:
    """Seconds that call() takes on one thread: the least of many.

    It is the thread's own CPU time: if other programs share the core, or a container's limit throttles it, wall time can
    be 20 times as long, and the result is cached.
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
    """FLOP/s of a large square matrix product, the best of a few: the most that this process can reach."""

    def seconds(n: int, count: int) -> float:
        generator = torch.Generator(device).manual_seed(0)  # the run's own generator stays as it is
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
        while n < 8192 and seconds(n, 3) < 0.002:  # the rates of cores and dtypes differ by a factor of 100
            n *= 2
    return 2 * n**3 / seconds(n, 5)
