"""Compares minillama's training step with transformers + peft's and torchtune's: the same work, in turns, in one run.

    python tools/bench.py                                        LoRA on SmolLM2-135M's shape, 1 x 1024 tokens
    python tools/bench.py --documents packed --floor             packed documents; and the step's bare matmuls and attention
    python tools/bench.py --method full --precision bf16
    python tools/bench.py --quantize nf4 --targets all-linear    the same LoRA on a quantised base
    python tools/bench.py --memory-sweep --json m.json --plot m.png     peak memory, 512 to 8192 tokens
    python tools/bench.py --loss                                 the loss alone, compared with PyTorch's own
    python tools/bench.py --generate --model DIR                 greedy text, which must be equal
    python tools/bench.py --startup                              import, --help, first step, loading
    python tools/bench.py --all out/bench --device cuda          1B, 3B, 8B on a GPU: everything in under 20 minutes

Random weights and tokens, the same for all: losses and gradient norms must agree, and are printed. Each contender is a
process of its own (tools/bench_parts) that keeps its model. On CPU they take turns, so that other load on the machine
affects all equally; on CUDA they run one after the other, so that each has all the memory. Tokens per second count all
tokens; ratios are taken within a round. MFU: minillama.training.flops.step_flops over the time and the rate of a matmul
timed right after.

transformers and peft are of this environment. torchtune 0.6.1 needs one of its own, given by --torchtune-python
TORCHTUNE/bin/python:

    python3 -m venv TORCHTUNE
    TORCHTUNE/bin/pip install torch==2.13.0 torchtune==0.6.1 torchao==0.10.0
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from minillama.errors import UserError
from minillama.formats.hf import read_config
from minillama.hardware.precision import choose_precision
from minillama.model.config import LlamaConfig
from minillama.parallel.sharding import FsdpConfig

PARTS = Path(__file__).parent / "bench_parts"

# hidden, MLP, layers, heads, key-value heads, vocabulary, tied, RoPE base and factor
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512, True, 1e4, None),
    "wide-vocabulary": (512, 1536, 4, 8, 4, 128256, True, 5e5, None),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True, 1e5, None),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True, 5e5, 32.0),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, True, 5e5, 32.0),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, False, 5e5, 8.0),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256, False, 5e5, 8.0),
}
Shape = Literal[
    "tiny", "wide-vocabulary", "smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b"
]
QUANTIZED = ("nf4", "int8")
Method = Literal["lora", "full", "llama-adapter"]
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all-linear"]


def shape_config(name: str) -> LlamaConfig:
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied, base, factor = SHAPES[name]
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=base,
        rope_scaling=scaling | {"original_max_position_embeddings": 8192} if factor else None,
        tie_word_embeddings=tied,
    )


@dataclass(frozen=True)
class Bench:
    """minillama and its peers on the same work. Of several shapes, methods or context lengths, every combination."""

    shape: tuple[Shape, ...] = ()
    """The model; by default smollm2-135m, for --memory-sweep wide-vocabulary, for --all Llama 1B, 3B and 8B."""
    method: tuple[Method, ...] = ()
    """lora: rank 8, alpha 32, no dropout. llama-adapter: 10 slots in the top 30 layers; torchtune has none. By default
    lora, for --all lora and full."""
    targets: tuple[Target, ...] = ("q_proj", "v_proj")
    """Linear layers that LoRA adapts."""
    context_length: tuple[int, ...] = ()
    """Tokens in a row; by default 1024, for --memory-sweep 512 to 8192, for --all 2048 and 8192."""
    batch_size: int = 1
    """Rows of a batch."""
    documents: Literal["none", "packed"] = "none"
    """none: a row is one document. packed: a row has documents of 50 to 400 tokens that do not attend to each other."""
    precision: Literal["auto", "mixed", "bf16", "fp32"] = "auto"
    """As --fsdp.precision; auto never takes fp16, for which the peers have no loss scale here. What the peers do under
    mixed: LoRA, bf16 base (peft: fp32 adapters); full, transformers with fp32 weights and autocast, torchtune all in
    bf16."""
    recompute: Literal["none", "full", "selective", "auto"] = "none"
    """As --fsdp.recompute; the peers, which have no selective, then do it in full. auto: none, and again with full if
    that runs out of memory."""
    compile: bool = False
    """Use torch.compile: ours and torchtune's block by block, transformers' model as a whole."""
    contenders: tuple[Literal["ours", "hf", "torchtune", "nf4", "int8"], ...] = ("ours", "hf")
    """torchtune joins when --torchtune-python is given. nf4, int8: ours on a base so quantised."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Compare ours with ours on a base so quantised: --contenders ours nf4, or ours int8."""
    torchtune_python: Path | None = None
    """The python of torchtune's environment."""
    floor: bool = False
    """Also time the step's bare matmuls and attention calls alone."""
    steps: int = 3
    """Steps in a contender's turn."""
    rounds: int = 5
    """Turns of each contender."""
    warmup: int = 2
    """Steps before the first turn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = os.cpu_count() or 1
    """Threads of each contender."""
    json: Path | None = None
    """Write all numbers there."""
    plot: Path | None = None
    """Draw the numbers there, with matplotlib."""

    memory_sweep: bool = False
    """Only the peak memory of one step after one of warmup, for several context lengths, each in a fresh process."""
    loss: bool = False
    """Only the loss and its gradients (--method full: the head's too): ours, torch's F.linear_cross_entropy, and the cross
    entropy of whole logits."""
    generate: bool = False
    """Greedy generation in fp32, or in bf16 with --precision bf16, in place of training."""
    model: Path | None = None
    """For --generate: a Hugging Face folder; without, random weights of --shape."""
    new_tokens: int = 64
    """For --generate."""
    startup: bool = False
    """Import, --help, time to the first step and loading speed, and nothing else."""
    all: Path | None = None
    """A folder for results.json, table.txt and plot.png of the cases that matter on a GPU: packed documents, as
    many rows as fill up to the longest context, --recompute auto, no new case after --minutes."""
    minutes: float = 18.0
    """For --all."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "rounds", "threads", "new_tokens", "warmup"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if any(length < 2 for length in self.context_length):
            raise UserError("--context-length: a row needs 2 tokens, of which one is predicted")
        if not self.minutes > 0:
            raise UserError(f"--minutes {self.minutes}: must be above 0")
        if not self.contenders or not self.targets:
            raise UserError("--contenders and --targets need a name each")
        modes = ("memory_sweep", "loss", "generate", "startup", "all")
        if len(given := [f"--{name.replace('_', '-')}" for name in modes if getattr(self, name)]) > 1:
            raise UserError(f"{' and '.join(given)}: give one of them")
        if self.plot and (not self.json or self.generate or self.startup):
            raise UserError(
                "--plot draws training steps, from what --json FILE holds: give both, not --generate or --startup"
            )
        for flag, file in (("json", self.json), ("plot", self.plot)):
            if file and (file.is_dir() or not os.access(file.parent, os.W_OK)):
                raise UserError(f"--{flag} {file} cannot be written")
        if {self.quantize, *self.contenders} & {*QUANTIZED} and "full" in self.method:
            raise UserError("a quantised base is frozen: give --method lora or llama-adapter")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use")
        if self.model and not self.generate:
            raise UserError("--model is for --generate: training is measured on random weights of --shape")
        if "torchtune" in self.contenders and not self.torchtune_python:
            raise UserError("--contenders torchtune: give its environment's python by --torchtune-python")
        if self.torchtune_python and not os.access(self.torchtune_python, os.X_OK):
            raise UserError(f"--torchtune-python {self.torchtune_python}: no such program; --help says how to make it")


def resolved(bench: Bench) -> Bench:
    """With the defaults of its mode."""
    if bench.all:
        try:
            bench.all.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--all {bench.all} cannot be written: {error.strerror}") from None
        bench = replace(bench, documents="packed", recompute="auto")
        bench = replace(bench, json=bench.all / "results.json", plot=bench.all / "plot.png")
        defaults: tuple[Any, ...] = (("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"), ("lora", "full"), (2048, 8192))
    elif bench.memory_sweep:
        bench = replace(bench, steps=1, rounds=1, warmup=1)
        defaults = (("wide-vocabulary",), ("lora",), (512, 1024, 2048, 4096, 8192))
    else:
        defaults = (("smollm2-135m",), ("lora",), (64 if bench.generate else 1024,))
    if bench.loss:
        bench = replace(bench, contenders=("ours", "torch", "logits"))  # type: ignore[arg-type]
    shape, method, context_length = defaults
    device = bench.device if bench.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if bench.precision == "auto":
        found = choose_precision(FsdpConfig(), device)[0].precision
        bench = replace(bench, precision="mixed" if found == "mixed" else "fp32")
    if bench.quantize != "none":
        bench = replace(bench, contenders=("ours", bench.quantize))
    if bench.torchtune_python and not bench.loss and "torchtune" not in bench.contenders:
        bench = replace(bench, contenders=(*bench.contenders, "torchtune"))
    return replace(
        bench,
        shape=bench.shape or shape,
        method=bench.method or method,
        context_length=bench.context_length or context_length,
        device=device,
    )


# --- contenders, in processes of their own


class Failed(Exception):
    """The reason why a contender cannot go on."""


class Contender:
    """A process that trains or generates when asked; see tools/bench_parts/__main__.py."""

    def __init__(self, name: str, bench: Bench, job: dict[str, Any]) -> None:
        python = bench.torchtune_python if name == "torchtune" else sys.executable
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": str(bench.threads)}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by close()
        self.process = subprocess.Popen(
            [str(python), str(PARTS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
        )
        self._send(job | {"contender": name})

    def _send(self, line: dict[str, Any]) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # receive says why
            print(json.dumps(line), file=self.process.stdin, flush=True)

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            last = next((line for line in reversed(self.log.read().splitlines()) if line.strip()), "")
            raise Failed("killed: out of memory?" if code == -9 else f"ended with code {code}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def ask(self, first: int, count: int) -> dict[str, Any]:
        self._send({"first": first, "count": count})
        return self.receive()

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


def take_turns(
    names: tuple[str, ...], bench: Bench, job: dict[str, Any]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """What each contender answered, its warmup first, and for each of those that failed {"error": why}.

    All run at once, and take turns at the same steps.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failures: dict[str, Any] = {}
    contenders = {name: Contender(name, bench, job) for name in names}
    try:
        turns = [(0, bench.warmup)] + [(bench.warmup + r * bench.steps, bench.steps) for r in range(bench.rounds)]
        if job["generate"]:
            turns = [(number, bench.new_tokens) for number in range(bench.rounds + 1)]
        for turn in [None, *turns]:
            for name in [name for name in names if name not in failures]:
                contender = contenders[name]
                try:
                    if turn is None:
                        answers[name].append(contender.receive())
                    else:
                        answers[name].append(contender.ask(*turn))
                except Failed as error:
                    failures[name] = {"error": str(error), "built": bool(answers[name])}
    finally:
        for contender in contenders.values():
            contender.close()
    return answers, failures


# --- numbers


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def training_result(answers: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """tokens: of a step."""
    ready, *turns = answers
    timed = turns[1:]
    tokens_per_s = [tokens * len(turn["seconds"]) / sum(turn["seconds"]) for turn in timed]
    parts = [part for turn in timed for part in turn["parts"]]
    return {
        "versions": ready["versions"],
        "tokens_per_s": spread(tokens_per_s),
        "turns": tokens_per_s,
        "cpu_seconds": [turn["cpu_seconds"] / len(turn["seconds"]) for turn in timed],
        "mfu": statistics.median(turn["flops"] / sum(turn["seconds"]) / turn["matmul_rate"] for turn in timed),
        "matmul_tflops": statistics.median(turn["matmul_rate"] for turn in timed) / 1e12,
        "peak_gib": max(turn["peak_gib"] for turn in turns),
        "losses": [loss for turn in turns for loss in turn["losses"]],
        "norms": [norm for turn in turns for norm in turn["norms"]],
        "parts_s": {name: statistics.median(part[name] for part in parts) for name in (parts[0] if parts else ())},
    }


def run_case(bench: Bench, shape: Shape, method: Method, context_length: int) -> dict[str, Any]:
    job = {
        "config": asdict(shape_config(shape)),
        "method": method,
        "context_length": context_length,
        "generate": False,
        "loss": bench.loss,
        **{name: getattr(bench, name) for name in ("targets", "batch_size", "documents", "precision", "compile")},
        **{name: getattr(bench, name) for name in ("device", "threads")},
    }
    names: tuple[str, ...] = (*bench.contenders, *(["floor"] if bench.floor else []))
    together = bench.device == "cpu" and not bench.memory_sweep
    results: dict[str, Any] = {}
    for group in [names] if together else [(name,) for name in names]:
        left = group
        for recompute in ("none", "full") if bench.recompute == "auto" else (bench.recompute,):
            answers, failures = take_turns(left, bench, job | {"recompute": recompute})
            for name in left:
                if name in failures:
                    results[name] = {"error": failures[name]["error"]}
                else:
                    result = training_result(answers[name], bench.batch_size * context_length)
                    theirs = "full" if recompute == "selective" and name in ("hf", "torchtune") else recompute
                    results[name] = result | {"recompute": theirs}
            left = tuple(name for name in failures if failures[name]["built"] and "memory" in failures[name]["error"])
            if not left:
                break
    case = {"shape": shape, "method": method, "batch_size": bench.batch_size, "context_length": context_length}
    return case | {"contenders": results} | comparison(results)


def comparison(results: dict[str, Any]) -> dict[str, Any]:
    """Ratios of ours to each other contender, round by round, and the differences of the losses.

    Also by CPU time of all threads, which can still be compared on a busy machine.
    """
    ours = results.get("ours", {})
    others = {name: result for name, result in results.items() if name != "ours" and "error" not in result}
    if "turns" not in ours:
        return {"ratios": {}, "cpu_ratios": {}, "loss_difference": {}}
    ratios, cpu_ratios, differences = {}, {}, {}
    for name, result in others.items():
        ratios[name] = spread([a / b for a, b in zip(ours["turns"], result["turns"], strict=True)])
        if name == "floor":  # has no loss
            continue
        cpu = zip(ours["cpu_seconds"], result["cpu_seconds"], strict=True)
        cpu_ratios[name] = spread([theirs / own for own, theirs in cpu])
        if name in QUANTIZED:  # another base
            continue
        losses = zip(ours["losses"], result["losses"], strict=True)
        differences[name] = max(abs(a - b) / a for a, b in losses)
    return {"ratios": ratios, "cpu_ratios": cpu_ratios, "loss_difference": differences}


# --- what is said


def heading(bench: Bench, case: dict[str, Any]) -> str:
    if bench.loss:
        size = f"{case['batch_size']} x {case['context_length']}"
        return f"loss of {case['shape']} {case['method']} {size}, {bench.precision}, {bench.device}"
    documents = "packed documents of 50 to 400 tokens" if bench.documents == "packed" else "one document a row"
    how = "compiled" if bench.compile else "eager"
    return (
        f"{case['shape']} {case['method']} {case['batch_size']} x {case['context_length']}, {documents}, "
        f"{bench.precision}, {how}, {bench.device}"
    )


def least_most(values: dict[str, float], digits: int) -> str:
    return f"{values['least']:.{digits}f}-{values['most']:.{digits}f}"


def rows(case: dict[str, Any]) -> Iterator[str]:
    yield (
        f"  {'':10} {'tokens/s':>9} {'least-most':>17}  {'ours/it':>7} {'least-most':>11}  {'peak GiB':>8}  {'MFU':>5}"
        f"  {'loss':>8} {'norm':>8}  recompute"
    )
    for name, result in case["contenders"].items():
        if "error" in result:
            yield f"  {name:10} {result['error']}"
            continue
        speed, ratio = result["tokens_per_s"], case["ratios"].get(name)
        line = f"  {name:10} {speed['median']:9.1f} {least_most(speed, 1):>17}  "
        line += f"{ratio['median']:7.2f} {least_most(ratio, 2):>11}  " if ratio else " " * 21
        if name == "floor":
            parts = ", ".join(f"{part} {seconds:.3g} s" for part, seconds in result["parts_s"].items())
            yield f"{line}{'':8}  {result['mfu']:5.1%}  {parts} a step"
            continue
        line += f"{result['peak_gib']:8.2f}  {result['mfu']:5.1%}  {result['losses'][0]:8.4f} {result['norms'][0]:8.4f}"
        shares = [f"; dequantising {share:.1%} of the step" for share in result["parts_s"].values()]
        yield f"{line}  {result['recompute']}{''.join(shares)}"
    rates = [result["matmul_tflops"] for result in case["contenders"].values() if "matmul_tflops" in result]
    if rates:
        apart = max(case["loss_difference"].values(), default=0.0)
        line = f"  matmul {statistics.median(rates):.3g} TFLOP/s"
        line += f"; losses differ by at most {apart:.1e}" if case["loss_difference"] else ""
        yield line + "".join(f"; ours/{name} by CPU time {r['median']:.2f}" for name, r in case["cpu_ratios"].items())


# --- modes


def compare_training(bench: Bench) -> None:
    began, cases, text = time.perf_counter(), [], []
    name = torch.cuda.get_device_name() if bench.device == "cuda" else f"CPU, {bench.threads} threads"

    def say(line: str) -> None:
        text.append(line)
        print(line, flush=True)

    say(f"{name}; torch {torch.__version__}; {bench.rounds} rounds of {bench.steps} steps")
    for shape, method, length in itertools.product(bench.shape, bench.method, bench.context_length):
        if bench.all and time.perf_counter() - began > 60 * bench.minutes:
            say(f"{shape} {method} {length}: not run, the {bench.minutes:g} minutes are over")
            continue
        rows_of_case = bench.batch_size * (max(bench.context_length) // length if bench.all else 1)
        case = run_case(replace(bench, batch_size=rows_of_case), shape, method, length)
        cases.append(case)
        say(heading(bench, case))
        for row in rows(case):
            say(row)
        # after each case: a run that is stopped has left what it measured
        if bench.json:
            settings = json.loads(json.dumps(asdict(bench), default=str))
            bench.json.write_text(json.dumps({"machine": name, "settings": settings, "cases": cases}, indent=1) + "\n")
        if bench.all:
            (bench.all / "table.txt").write_text("\n".join(text) + "\n")
    if bench.plot:
        subprocess.run([sys.executable, str(PARTS / "plot.py"), str(bench.json), str(bench.plot)], check=True)


def compare_generation(bench: Bench) -> None:
    config = read_config(bench.model) if bench.model else shape_config(bench.shape[0])
    job = {
        "config": asdict(config),
        "model": str(bench.model.resolve()) if bench.model else None,
        "precision": "bf16" if bench.precision == "bf16" else "fp32",
        "context_length": bench.context_length[0],
        "batch_size": 1,
        "documents": "none",
        "device": bench.device,
        "threads": bench.threads,
        "generate": True,
        "loss": False,
    }
    model = bench.model or bench.shape[0]
    print(
        f"{model}, {job['precision']}, a prompt of {job['context_length']} tokens, {bench.device}, {bench.threads} threads"
    )
    answers, failures = take_turns(("ours", "hf"), bench, job)
    for name, failure in failures.items():
        raise UserError(f"{name}: {failure['error']}")
    speeds = {name: [bench.new_tokens / turn["seconds"] for turn in found[2:]] for name, found in answers.items()}
    ratio = spread([a / b for a, b in zip(speeds["ours"], speeds["hf"], strict=True)])
    for name, values in speeds.items():
        print(f"  {name:6} {statistics.median(values):8.1f} tokens/s ({least_most(spread(values), 1)})")
    print(f"  ours/hf {ratio['median']:.2f} ({least_most(ratio, 2)})")
    if bench.json:
        bench.json.write_text(json.dumps({"tokens_per_s": speeds, "ratio": ratio, "job": job}, indent=1) + "\n")
    if [turn["answer"] for turn in answers["ours"][1:]] != [turn["answer"] for turn in answers["hf"][1:]]:
        raise UserError("the texts differ: nothing was compared")
    print(f"  {len(answers['ours']) - 1} texts of {bench.new_tokens} tokens, equal")


def main(bench: Bench) -> None:
    bench = resolved(bench)
    if bench.startup:
        command = [sys.executable, str(PARTS / "startup.py"), bench.device, str(bench.json or "")]
        sys.exit(subprocess.run(command, check=False).returncode)
    if bench.generate:
        compare_generation(bench)
    else:
        compare_training(bench)


if __name__ == "__main__":
    import tyro

    from minillama.help import filled
    from minillama.parallel.failures import user_errors

    with user_errors():
        main(tyro.cli(filled(Bench), description=__doc__))
