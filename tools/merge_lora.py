"""Merge a LoRA adapter into its base model: a Hugging Face folder that serves like any other.

    python tools/merge_lora.py Llama-3.1-8B out/alpaca/adapter hf/alpaca

The adapter is ours or PEFT's own: LoRA, rsLoRA or DoRA. W + B A is added in fp32, a few rows at a time, so memory stays
small however large the model is. The same as --lora.merge at the end of a run.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from minillama.adapters.merge import merge_adapter
from minillama.files import check_unused, folder_size, size_text
from minillama.formats.hub import find_model
from minillama.formats.quantized import Quantize
from minillama.help import filled
from minillama.parallel.failures import user_errors


def merge_lora(
    base: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")],
    adapter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    *,
    dtype: Literal["same", "bfloat16", "float16", "float32"] = "same",
    tokenizer: Path | None = None,
    any_base: bool = False,
    from_quantized: Quantize = "none",
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
    """
    check_unused(target, base, adapter)
    merge_adapter(
        find_model(base),
        adapter,
        target,
        tokenizer,
        dtype=None if dtype == "same" else getattr(torch, dtype),
        any_base=any_base,
        from_quantized=from_quantized,
    )
    print(f"{target}: {size_text(folder_size(target))}")


if __name__ == "__main__":
    with user_errors():
        tyro.cli(filled(merge_lora))
