"""Merge a LoRA adapter into its base model: a Hugging Face folder that serves like any other.

    python tools/merge_lora.py Llama-3.1-8B out/alpaca/adapter hf/alpaca

The adapter is ours or PEFT's own: LoRA, rsLoRA or DoRA. W + B A is added in fp32, a few rows at a time, so memory stays
small however large the model is. The same as --lora.merge at the end of a run. Of an adapter that was trained on a
quantised base it then says what merging changed: the loss on rows that the run held out, before and after.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

import gc
import math
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import torch
import tyro

from minillama.adapters.merge import merge_adapter
from minillama.data.datasets import DataConfig, PreferenceConfig, training_sources
from minillama.data.load import load_data
from minillama.data.packing import Packed
from minillama.errors import UserError
from minillama.files import check_unused, folder_size, misfit, read_json, size_text
from minillama.formats.hf import open_weights, read_config
from minillama.formats.hub import find_model, model_name
from minillama.formats.quantized import Quantize
from minillama.help import filled
from minillama.inference.load import load_model
from minillama.parallel.failures import user_errors
from minillama.parallel.memory import least_memory
from minillama.parallel.processes import process_group
from minillama.progress import progress
from minillama.tokenizer.tokenizer import load_tokenizer
from minillama.training.config import from_flags
from minillama.training.dpo import DpoConfig
from minillama.training.plan import EvalConfig, eval_batches
from minillama.training.run import flags_of_pairs, flags_of_rows
from minillama.training.step import evaluate


def merge_lora(
    base: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")],
    adapter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    *,
    dtype: Literal["same", "bfloat16", "float16", "float32"] = "same",
    tokenizer: Path | None = None,
    any_base: bool = False,
    from_quantized: Quantize = "none",
    held_out_tokens: int = 8192,
) -> None:
    """Merge a LoRA adapter into its base model.

    Args:
        base: the model that the adapter was trained on: a Hugging Face or Meta folder, or ORG/NAME of the hub.
        adapter: the adapter's folder, in PEFT's format.
        target: the folder to write; it must not exist yet, or be empty.
        dtype: of the weights written. same: as in the base.
        tokenizer: folder or file to take the tokenizer from; None: the base's own.
        any_base: merge also if the adapter names another base, as long as its tensors fit.
        from_quantized: add the adapter to what the base is once it was quantised so, as it was in training. none: to the
            base as it is.
        held_out_tokens: of an adapter trained on a quantised base: measure the loss before and after on so many tokens of
            the rows that its run held out, all if there are fewer; 0: do not measure.
    """
    if held_out_tokens < 0:
        raise UserError(f"--held-out-tokens {held_out_tokens}: must be at least 0")
    check_unused(target, base, adapter)
    base = find_model(base)
    merge_adapter(
        base,
        adapter,
        target,
        tokenizer,
        dtype=None if dtype == "same" else getattr(torch, dtype),
        any_base=any_base,
        from_quantized=from_quantized,
    )
    print(f"{target}: {size_text(folder_size(target))}")
    run = flags_of_run(adapter)
    trained_on: Quantize = run["lora"]["quantize"] if run else "none"
    kind = from_quantized if from_quantized != "none" else trained_on
    if kind == "none" or not held_out_tokens:
        return
    with process_group() as device:
        try:
            rows, tokenizer, cache_dir = held_out_rows(run, base, device)
        except UserError as error:
            print(f"held-out loss: not measured, because {error}. To compare, measure both:")
            for flags in flags_to_compare(run, base, adapter, target, kind):
                print(f"  python recipes/evaluate.py --model {flags}")
            return
        cases: list[tuple[str, Path, Path | None, Quantize]] = [
            (f"the adapter on the base in {kind}, as it was trained", base, adapter, kind),
            (f"merged, as {target} is", target, None, "none"),
        ]
        if from_quantized != "none":
            cases.append(("the adapter on the plain base, as without --from-quantized", base, adapter, "none"))
        packs = min(len(rows), math.ceil(held_out_tokens / (rows.tokens / len(rows))))
        losses: list[float] = []
        for name, folder, own, quantize in cases:
            model = load_model(folder, device, adapter=own, quantize=quantize, cache_dir=cache_dir)
            batches = eval_batches(rows, EvalConfig(max_steps=packs), tokenizer.pad_id, device, 0, 1)
            result = evaluate(model, progress(batches, desc="held-out rows", total=packs, leave=False))
            assert result
            if not losses:
                print(f"loss on {result[1]:,} trained tokens that the run held out:")
            losses.append(result[0])
            print(f"  {losses[-1]:.4f}  {name}" + f" ({losses[-1] - losses[0]:+.4f})" * (len(losses) > 1))
            del model
            gc.collect()  # a sharded model is in reference cycles


def flags_of_run(adapter: Path) -> dict[str, Any] | None:
    """The flags of the run that left the adapter, from the run.json beside it; None: there is none, or it is no LoRA's."""
    file = adapter.resolve().parent / "run.json"
    if not file.exists():
        return None
    content = read_json(file)
    flags = {"seed": int, "tokenizer": (None, str), "data": {}, "eval": {"enabled": bool}}
    flags["lora"] = {"quantize": ("none", "nf4", "int8")}
    return None if misfit(content, {"flags": flags}) else content["flags"]


def flags_to_compare(run: dict[str, Any] | None, base: Path, adapter: Path, target: Path, kind: Quantize) -> list[str]:
    """Of evaluate.py: for the adapter on the base quantised as `kind`, and for what it was merged to. FORMAT and FILE stand
    for the user's rows where the run names none."""
    name, rows, reference = quote(model_name(base)), "--data.dataset FORMAT --data.path FILE", ""
    if run is not None:
        data = from_flags(PreferenceConfig if "dpo" in run else DataConfig, run["data"], "run.json")
        rows = flags_of_rows(data, run["seed"], evaluated=run["eval"]["enabled"])
        if "dpo" in run:
            dpo = from_flags(DpoConfig, run["dpo"], "run.json")
            rows += flags_of_pairs(dpo, None)
            reference = f" --reference {name}" if dpo.has_reference else ""
    return [
        f"{name} --adapter {quote(str(adapter))} --quantize {kind} {rows}",
        f"{quote(str(target))} {rows}{reference}",
    ]


def held_out_rows(run: dict[str, Any] | None, base: Path, device: str) -> tuple[Packed, Any, Path | None]:
    """What the run evaluated on, its tokenizer and its cache. Raises UserError with the reason if that cannot be measured
    here."""
    if run is None:
        raise UserError("no run.json beside the adapter names the rows of its run")
    if "dpo" in run or not run["eval"]["enabled"]:
        raise UserError("its run learned from pairs of answers" if "dpo" in run else "its run held no rows out")
    config, weights = read_config(base), open_weights(base)
    size = sum(math.prod(weights.shape(name)) for name in weights.names) * (2 if device == "cuda" else 4)
    if size > least_memory(device) / 2:
        raise UserError(f"a model of {size_text(size)} needs several processes, which torchrun starts")
    data = from_flags(DataConfig, run["data"], "run.json")
    if own := [source.dataset for source in training_sources(data) if source.is_own or data.is_own]:
        # it may be someone else's
        raise UserError(f"its rows come from {own[0]}, and nothing that a run.json names is run")
    tokenizer = load_tokenizer(run["tokenizer"] or base, day=data.day)
    _, rows = load_data(data, tokenizer, config.vocab_size, run["seed"], validation=True)
    assert rows
    return rows, tokenizer, data.cache_dir


if __name__ == "__main__":
    with user_errors():
        tyro.cli(filled(merge_lora))
