"""Adapter folders in PEFT's format, in and out: adapter_config.json and adapter_model.safetensors."""

import re
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minillama.distributed import like, local, reshard
from minillama.errors import UserError
from minillama.files import new_folder, read_json, write_json
from minillama.hf import adapter_parameters, gather, open_tensors, write_tensors
from minillama.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.lora import LoraConfig, apply_lora
from minillama.model import Llama

PEFT_PREFIX = "base_model.model."
OTHER_PEFT = (
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
"""Settings of PEFT's that change what an adapter computes, and that we do not know."""

AdapterConfig = LoraConfig | LlamaAdapterConfig
A = TypeVar("A", LoraConfig, LlamaAdapterConfig)


def _adapt(model: nn.Module, config: AdapterConfig) -> nn.Module:
    return apply_lora(model, config) if isinstance(config, LoraConfig) else apply_llama_adapter(model, config)


def _as_peft(name: str, tensor: Tensor) -> Tensor:
    """The parameter in the shape that PEFT gives it, without a copy: a prompt as (1, prompt_len, C)."""
    return tensor[None] if name.endswith(".adaption_prompt") else tensor


def save_adapter(model: Llama, folder: str | Path, config: AdapterConfig, base_model: str) -> None:
    """Writes the adapter that `config` made in PEFT's format: whole folder or nothing, every parameter in its dtype.

    Every rank must call it, with or without a process group; only the adapter is gathered, and rank 0 writes.
    base_model: the name or path that goes into the config as base_model_name_or_path. Raises UserError, on every rank,
    for a model whose adapters are not just those of `config` (PEFT has no format for a mix), and for what goes wrong on
    the disk.
    """
    with torch.device("meta"):
        fresh = _adapt(Llama(model.config), config)
    expected, there = ({f"{n} {list(p.shape)}" for n, p in adapter_parameters(m).items()} for m in (fresh, model))
    if expected != there:
        raise UserError(
            "the model's adapters are not those of the config, and PEFT's format holds one kind: "
            + _difference(expected - there, there - expected)
        )
    reshard(model)
    tensors = {PEFT_PREFIX + n: _as_peft(n, gather(p)) for n, p in adapter_parameters(model).items()}
    settings = peft_config(config, base_model, model.config.num_hidden_layers)
    with new_folder(Path(folder).resolve(), mark="adapter_config.json") as (path, on_disk):
        on_disk(write_json, path / "adapter_config.json", settings)
        on_disk(write_tensors, path / "adapter_model.safetensors", tensors)


def peft_config(config: AdapterConfig, base_model: str, num_layers: int) -> dict[str, Any]:
    """What goes into adapter_config.json: only keys that older versions of PEFT, and vLLM, know too.

    num_layers: how many the model has; PEFT takes no adapter_layers beyond it.
    """
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
    if isinstance(config, LlamaAdapterConfig):
        return common | {
            "peft_type": "ADAPTION_PROMPT",
            "adapter_len": config.prompt_len,
            "adapter_layers": min(config.layers, num_layers),
            "target_modules": "self_attn",
        }
    return common | {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": "all-linear" if "all-linear" in config.targets else list(config.targets),
        "use_rslora": config.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def read_adapter_config(model: nn.Module, folder: str | Path) -> AdapterConfig:
    """The config of a LoRA or llama-adapter folder in PEFT's format, ours or PEFT's own. model: the base, meta or not.

    Raises UserError for settings of PEFT's that we do not know.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the adapter folder {folder} does not exist")
    settings = read_json(folder / "adapter_config.json")
    match settings.get("peft_type"):
        case "LORA":
            return _lora_config(model, folder, settings)
        case "ADAPTION_PROMPT":
            return _llama_adapter_config(folder, settings)
        case kind:
            raise UserError(f"{folder}: peft_type {kind!r} is not supported, only LORA and ADAPTION_PROMPT are")


def continue_adapter(flags: A, model: nn.Module, folder: str | Path) -> A:
    """flags, an adapter's config, with what the adapter in `folder` has in place of the defaults. model: the base.

    Raises UserError for a folder of another kind of adapter, and for a flag that is neither the default nor the folder's
    value; only the dropout may change.
    """
    saved = read_adapter_config(model, folder)
    if not isinstance(flags, type(saved)):
        raise UserError(f"{folder} holds another kind of adapter: {saved}")
    values = asdict(saved)
    for field in fields(saved):
        value, wanted = getattr(flags, field.name), values[field.name]
        if value == field.default or value == wanted:
            continue
        if field.name != "dropout":
            raise UserError(
                f"{field.name} {value} was asked for, and the adapter in {folder} has {wanted}: leave it out"
            )
        values["dropout"] = value
    return replace(flags, **values)


def check_adapter(model: nn.Module, folder: str | Path) -> None:
    """Raises UserError unless the keys of an adapter folder are exactly the adapted model's, and have their shapes.

    Reads the file's header only; the model may be on the meta device.
    """
    file, wanted = Path(folder) / "adapter_model.safetensors", adapter_parameters(model)
    if not file.exists() and file.with_suffix(".bin").exists():
        raise UserError(f"{folder} holds adapter_model.bin, a pickle: load it in peft and save it as safetensors")
    with open_tensors(file) as tensors:
        there, names = set(tensors.keys()), {PEFT_PREFIX + name for name in wanted}
        if there != names:
            raise UserError(f"{file} does not fit the model: {_difference(names - there, there - names)}")
        for name, parameter in wanted.items():
            shape = tensors.get_slice(PEFT_PREFIX + name).get_shape()
            expected = list(_as_peft(name, torch.empty(parameter.shape, device="meta")).shape)
            if shape != expected:
                raise UserError(f"{file} does not fit the model: {name} has shape {shape}, not {expected}")


@torch.no_grad()
def load_adapter_weights(model: nn.Module, folder: str | Path) -> set[str]:
    """Fills the adapter parameters of a materialised model, sharded or not, from a folder in PEFT's format.

    Returns their names. Raises UserError as check_adapter does, before it writes anything.
    """
    check_adapter(model, folder)
    parameters = adapter_parameters(model)
    with open_tensors(Path(folder) / "adapter_model.safetensors") as tensors:
        for name, parameter in parameters.items():
            whole = tensors.get_tensor(PEFT_PREFIX + name).to(parameter.dtype).view(parameter.shape)
            local(parameter).copy_(local(like(whole, parameter)))
    return set(parameters)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Adapts an unsharded base model with a LoRA or llama-adapter folder in PEFT's format, ours or PEFT's own.

    What is added is frozen. Raises UserError for a model that has an adapter already, for settings of PEFT's that we do
    not know, and if the folder's keys are not exactly the adapted model's, or their shapes differ.
    """
    if adapter := next(iter(adapter_parameters(model)), None):
        raise UserError(
            f"{folder}: the model has an adapter already ({adapter}): load one, into the base model, or merge_lora "
            "between two"
        )
    _adapt(model, read_adapter_config(model, folder))
    load_adapter_weights(model, folder)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(False)
    return model


def _lora_config(model: nn.Module, folder: Path, settings: dict[str, Any]) -> LoraConfig:
    for key in (
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "lora_bias",
        *OTHER_PEFT,
    ):
        if settings.get(key):
            raise UserError(f"{folder}: {key} = {settings[key]!r} is not supported")
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise UserError(
            f"{folder}: init_lora_weights = {settings['init_lora_weights']!r} is not supported: it changes the base"
        )
    targets = settings.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":  # a regular expression for the whole name
        targets = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    numbers = (settings.get("r"), settings.get("lora_alpha"), settings.get("lora_dropout", 0.0))
    if not targets or not all(type(number) in (int, float) for number in numbers):
        raise UserError(
            f"{folder}/adapter_config.json needs the numbers r and lora_alpha, and target_modules that match"
        )
    return LoraConfig(
        rank=numbers[0],  # type: ignore[arg-type]
        alpha=numbers[1],  # type: ignore[arg-type]
        dropout=numbers[2],
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        rslora=settings.get("use_rslora", False),
    )


def _llama_adapter_config(folder: Path, settings: dict[str, Any]) -> LlamaAdapterConfig:
    if settings.get("target_modules") not in (None, "self_attn"):
        raise UserError(
            f'{folder}: target_modules = {settings["target_modules"]!r} is not supported, only "self_attn" is'
        )
    numbers = (settings.get("adapter_len"), settings.get("adapter_layers"))
    if not all(type(number) is int and number > 0 for number in numbers):
        raise UserError(f"{folder}/adapter_config.json needs the whole numbers adapter_len and adapter_layers, above 0")
    return LlamaAdapterConfig(*numbers)  # type: ignore[arg-type]


def _difference(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    parts = [f"{name} is missing" for name in sorted(missing)] + [
        f"{name} is unexpected" for name in sorted(unexpected)
    ]
    return "; ".join(parts[:6]) + (f", and {len(parts) - 6} more" if len(parts) > 6 else "")
