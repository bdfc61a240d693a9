"""A model ready to answer: a base, or a base with an adapter, on one process or sharded over all."""

from pathlib import Path
from typing import Any, Literal

import torch

from minillama.adapters.peft import adapt, check_adapter, load_adapter_weights, read_adapter_config
from minillama.files import read_json
from minillama.formats.hf import check_weights, load_weights, read_config
from minillama.formats.quantized import Quantize, quantize_base
from minillama.hardware.kernels import KernelsConfig, choose_kernels
from minillama.hardware.precision import choose_precision, compact_base
from minillama.model.llama import Llama
from minillama.parallel.initialise import materialise
from minillama.parallel.sharding import FsdpConfig, make_mesh, set_dtypes, shard

Dtype = Literal["auto", "bf16", "fp16", "fp32"]

END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")


def load_model(
    folder: Path,
    device: str,
    *,
    adapter: Path | None = None,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    cache_dir: Path | None = None,
) -> Llama:
    """A base folder, and an adapter folder for it, as a frozen model that computes in dtype.

    dtype: auto takes what the hardware multiplies fast, as --fsdp.precision auto does. quantize: how the blocks' linear
    layers are held; none: as in the folder. cache_dir: where measurements are remembered. Every rank must call it; on
    several each holds a part. Raises UserError, before it reads any weight, for a folder that is none, and an adapter of
    another model.
    """
    with torch.device("meta"):
        model = Llama(read_config(folder)).requires_grad_(False)
    weights = check_weights(model, folder)
    quantize_base(model, weights, quantize)
    if adapter:
        adapt(model, read_adapter_config(adapter))
        check_adapter(model, adapter, base=folder)
        model.requires_grad_(False)
    fsdp = FsdpConfig(strategy="full-shard", precision=dtype)
    fsdp, _ = choose_precision(fsdp, device, flag="--dtype", cache_dir=cache_dir)
    set_dtypes(model, fsdp)
    mesh = make_mesh(fsdp, device)
    choose_kernels(model, KernelsConfig(), fsdp.compute_dtype, device, cache_dir)
    if compact_base(model, weights, fsdp, mesh) or mesh.size() > 1:
        shard(model, mesh, fsdp)
    materialise(model, device)
    load_weights(model, folder)
    if adapter:
        load_adapter_weights(model, adapter)
    return model.eval()


def find_stop_ids(tokenizer: Any, folder: Path) -> set[int]:
    """The tokens that end an answer: end of text, end of turn, and those of the model's generation settings."""
    ids = {tokenizer.eos_id, *(tokenizer.id_of(token) for token in END_TOKENS)}
    for file in (folder / "config.json", folder / "generation_config.json"):
        named = read_json(file).get("eos_token_id") if file.exists() else None
        ids |= {token for token in (named if isinstance(named, list) else [named]) if type(token) is int}
    return {token for token in ids if token is not None}
