"""Adapter folders in PEFT's format, in and out: adapter_config.json and adapter_model.safetensors."""

import os
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora, row_norms
from minillama.errors import UserError
from minillama.files import new_folder, read_json, write_json
from minillama.formats.hf import SAFETENSORS_DTYPES, adapter_parameters, open_tensors, weights_fingerprint
from minillama.formats.hf_export import gather, write_tensors
from minillama.formats.meta import finite
from minillama.model.llama import Llama
from minillama.model.quant import Quantized, dequantize
from minillama.parallel.heartbeat import stand
from minillama.parallel.processes import rank, warn
from minillama.parallel.sharding import like, local, reshard, row_offset

PEFT_PREFIX = "base_model.model."
CHANGE = ".lora_magnitude_change"
"""Our name for DoRA: PEFT holds the magnitude itself, which is this plus the length of each row of W."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OTHER_PEFT = (
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
"""Settings of PEFT that change what an adapter computes and that we do not support."""
SETTINGS = {
    "peft_type": str,
    "base_model_name_or_path": str,
    **dict.fromkeys(("r", "adapter_len", "adapter_layers"), int),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), float),
    **dict.fromkeys(("target_modules", "exclude_modules"), (str, [str])),
    **dict.fromkeys(("use_rslora", "use_dora"), bool),
    "rank_pattern": {...: int},
    "alpha_pattern": {...: float},
}
"""The types of the settings that we read, if they are there."""

KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""The values of PEFT's init_lora_weights that do not change the base"""
COPY_ROWS = 4096
"""Rows of a copy of the embedding that are compared at a time"""

AdapterConfig = LoraConfig | LlamaAdapterConfig
A = TypeVar("A", LoraConfig, LlamaAdapterConfig)


def adapt(model: Llama, config: AdapterConfig) -> Llama:
    """Applies the kind of adapter that config is of, best to a model on the meta device. Freezes nothing."""
    return apply_lora(model, config) if isinstance(config, LoraConfig) else apply_llama_adapter(model, config)


def peft_name(name: str) -> str:
    """What PEFT calls an adapter's parameter."""
    return PEFT_PREFIX + name.replace(CHANGE, ".lora_magnitude_vector")


def as_peft(name: str, tensor: Tensor) -> Tensor:
    """The parameter in the shape that PEFT gives it, without a copy: a prompt as (1, prompt_len, C)."""
    return tensor[None] if name.endswith(".adaption_prompt") else tensor


def _lengths(model: nn.Module, name: str) -> Tensor:
    """Length of this rank's rows of the weight whose lora_magnitude_change has this name: fp32 (rows,)."""
    module = model.get_submodule(name.removesuffix(CHANGE))
    assert isinstance(module.weight, Tensor)
    rows = local(module.weight)
    if isinstance(module, Quantized):
        rows = dequantize(rows, module.in_features, module.tables, first_row=row_offset(module.weight))
    return row_norms(rows)


def _gather_as_peft(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The whole tensor that PEFT has, on rank 0. Every rank must call it."""
    if name.endswith(CHANGE):
        magnitude = torch.empty_like(parameter, dtype=torch.float32)
        local(magnitude).copy_(local(parameter) + _lengths(model, name))
        parameter = magnitude
    return as_peft(name, gather(parameter))


@torch.no_grad()
def save_adapter(model: Llama, folder: str | Path, config: AdapterConfig, base_model: str) -> None:
    """Writes the adapter that `config` made in PEFT's format: whole folder or nothing, every parameter in its dtype.

    Every rank must call it, with or without a process group; only the adapter is gathered, and rank 0 writes.
    base_model: the name or path that goes into the config as base_model_name_or_path. Raises UserError, on every rank,
    for a model whose adapters are not just those of `config` (PEFT has no format for a mix), and for what goes wrong on
    the disk.
    """
    stand("writing the adapter")
    with torch.device("meta"):
        fresh = adapt(Llama(model.config), config)
    expected, there = ({f"{n} {list(p.shape)}" for n, p in adapter_parameters(m).items()} for m in (fresh, model))
    if expected != there:
        raise UserError(
            "the model's adapters are not those of the config, and PEFT's format holds one kind: "
            + _difference(expected - there, there - expected)
        )
    reshard(model)
    tensors = {peft_name(n): _gather_as_peft(model, n, p) for n, p in adapter_parameters(model).items()}
    write_adapter(folder, peft_config(config, base_model, model.config.num_hidden_layers), tensors)


def write_adapter(folder: str | Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes adapter_config.json and adapter_model.safetensors: whole folder or nothing. Every rank must call it."""
    with new_folder(Path(folder), mark="adapter_config.json") as (path, on_disk):
        on_disk(write_json, path / "adapter_config.json", settings)
        on_disk(write_tensors, path / "adapter_model.safetensors", tensors)


def peft_config(config: AdapterConfig, base_model: str, num_layers: int) -> dict[str, Any]:
    """The contents of adapter_config.json: only keys that older versions of PEFT, and vLLM, know too.

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
    targets: str | list[str] = list(config.targets)
    if targets == ["all-linear"]:
        targets = "all-linear"
    elif "all-linear" in targets:  # PEFT knows it only alone
        targets = [*LINEAR, *(target for target in targets if target not in (*LINEAR, "all-linear"))]
    return common | {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": config.ranks,
        "alpha_pattern": config.alphas,
    }


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_refusals(settings: dict[str, Any]) -> list[str]:
    """Why vLLM would not serve an adapter with this adapter_config.json, or which flag it needs; empty: it would serve it.

    The rules are those of vllm/lora/peft_helper.py and vllm/config/lora.py.
    """
    if settings.get("peft_type") != "LORA":
        return [f"it serves LoRA only, not {settings.get('peft_type')}"]
    found, rank = [], settings["r"]
    if settings.get("use_dora"):
        found.append("it does not know DoRA: serve the merged model, see tools/merge_lora.py")
    if settings.get("modules_to_save"):
        found.append(f"it knows no modules_to_save ({settings['modules_to_save']}): serve the merged model")
    if settings.get("bias", "none") != "none":
        found.append(f"it knows no trained biases (bias {settings['bias']!r}): serve the merged model")
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        found.append("it ignores rank_pattern and alpha_pattern: serve the merged model")
    if rank > VLLM_RANKS[-1]:
        found.append(f"rank {rank} is above its largest, {VLLM_RANKS[-1]}: serve the merged model")
    elif rank > 16:
        found.append(f"rank {rank} needs --max-lora-rank {next(r for r in VLLM_RANKS if r >= rank)}, its default is 16")
    return found


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """The config of a LoRA or llama-adapter folder in PEFT's format, ours or PEFT's own.

    Raises UserError for settings of PEFT's that we do not know.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else "does not exist"
        raise UserError(
            f"the adapter {folder} {found}: give the adapter/ that a run has left, or another in PEFT's format"
        )
    if not (folder / "adapter_config.json").exists():
        inside = folder / "adapter"
        found = "is the output of a run" if (folder / "run.json").exists() else "is no adapter folder"
        found = "is a model folder" if (folder / "config.json").exists() else found
        hint = f"give {inside}" if inside.is_dir() else "give the adapter/ that a run has left in its output folder"
        raise UserError(f"{folder} {found} (it has no adapter_config.json): {hint}")
    settings = read_json(folder / "adapter_config.json", SETTINGS)
    match settings.get("peft_type"):
        case "LORA":
            return _lora_config(folder, settings)
        case "ADAPTION_PROMPT":
            return _llama_adapter_config(folder, settings)
        case kind:
            raise UserError(f"{folder}: peft_type {kind!r} is not supported, only LORA and ADAPTION_PROMPT are")


def continue_adapter(flags: A, folder: str | Path) -> A:
    """flags, an adapter's config, with what the adapter in `folder` has in place of the defaults.

    Raises UserError for a folder of another kind of adapter, and for a flag that is neither the default nor the folder's
    value; only the dropout may change.
    """
    saved = read_adapter_config(folder)
    tied = read_json(Path(folder) / "adapter_config.json").get("ensure_weight_tying")
    if tied and isinstance(saved, LoraConfig) and {"lm_head", "model.embed_tokens"} <= set(saved.targets):
        raise UserError(
            f"{folder}: ensure_weight_tying, by which the head and the embedding learn the same, is not supported in "
            "training: merge it by tools/merge_lora.py, and start a new adapter on that"
        )
    if not isinstance(flags, type(saved)):
        raise UserError(f"{folder} holds another kind of adapter: {saved}")
    values, default = asdict(saved), type(saved)()
    for field in fields(saved):
        value, wanted = getattr(flags, field.name), values[field.name]
        if value in (getattr(default, field.name), wanted):
            continue
        if field.name != "dropout":
            raise UserError(
                f"{field.name} {value} was asked for, and the adapter in {folder} has {wanted}: leave it out"
            )
        values["dropout"] = value
    return replace(flags, **values)


def other_base(base: Path, adapter: Path) -> str | None:
    """A message if `base` is not the model that the adapter was trained on, as far as can be told; else None.

    If the model that the adapter names is available, their contents are compared, else their names.
    """
    named = read_json(adapter / "adapter_config.json", SETTINGS).get("base_model_name_or_path")
    if not named:
        return None
    problem = f"{base} is not that model"
    if os.path.isdir(named):  # unlike Path's, for any text
        try:
            if base.samefile(named) or weights_fingerprint(base) == weights_fingerprint(named):
                return None
        except UserError as error:
            problem = f"that is no model ({error})"
    else:  # a folder by that name, or the hub's cache of it
        cached = f"models--{named.replace('/', '--')}"
        if any(Path(named).name == place.name or cached in place.parts for place in (base.absolute(), base.resolve())):
            return None
    return f"{adapter} was trained on {named}, as its adapter_config.json says, and {problem}"


def check_adapter(model: nn.Module, folder: str | Path, *, base: Path | None = None) -> None:
    """Raises UserError unless the keys of an adapter folder are exactly the adapted model's, and have their shapes.

    Reads the file's header only; the model may be on the meta device. base: the model's folder; warns if the adapter was
    trained on another.
    """
    file, wanted = Path(folder) / "adapter_model.safetensors", adapter_parameters(model)
    if not file.exists() and file.with_suffix(".bin").exists():
        raise UserError(f"{folder} holds adapter_model.bin, a pickle: load it in peft and save it as safetensors")
    with open_tensors(file) as tensors:
        copies = copies_of_base(tensors.keys())
        for name, copied in copies.items():
            shape, here = tensors.get_slice(name).get_shape(), list(model.get_parameter(copied).shape)
            if shape != here:
                raise UserError(
                    f"{file}: the adapter was trained on a base whose {copied} has the shape {shape}, and here it is "
                    f"{here}: its vocabulary was changed; give the base that was saved with the new one"
                )
        there, names = set(tensors.keys()) - copies.keys(), {peft_name(name) for name in wanted}
        if there != names:
            raise UserError(f"{file} does not fit the model: {_difference(names - there, there - names)}")
        for name, parameter in wanted.items():
            rows = tensors.get_slice(peft_name(name))
            shape, kind = rows.get_shape(), rows.get_dtype()
            if kind not in SAFETENSORS_DTYPES.values():
                raise UserError(f"{file}: {name} is of {kind}, as where it is quantised: give a plain adapter")
            expected = list(as_peft(name, torch.empty(parameter.shape, device="meta")).shape)
            if shape != expected:
                raise UserError(f"{file} does not fit the model: {name} has shape {shape}, not {expected}")
    if base and rank() == 0 and (problem := other_base(base, Path(folder))):
        warn(f"{problem}: what it has learned may not fit there")


def copies_of_base(names: Iterable[str]) -> dict[str, str]:
    """The tensors of an adapter file that are the base's own embedding and head -> what they are a copy of.

    PEFT writes them along with an adapted head or embedding, and where the vocabulary has grown.
    """
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    plain = {name: name.removeprefix(PEFT_PREFIX).replace(".base_layer.weight", ".weight") for name in names}
    return {name: copied for name, copied in plain.items() if copied in ends}


def check_copy(file: Path | str, name: str, copy: Tensor, base: Tensor) -> None:
    """Raises UserError unless rows of an adapter's copy of the base's weight `name` are the base's, in either's dtype."""
    if not torch.equal(copy.to(base.dtype), base) and not torch.equal(base.to(copy.dtype), copy):
        raise UserError(
            f"{file} holds a {name} that is not the base's: it was trained too, or on another base; merge it in "
            "peft and give the merged model, or give the base that it was trained on"
        )


def _check_copies(model: nn.Module, file: Path, tensors: Any) -> None:
    for name, copied in copies_of_base(tensors.keys()).items():
        parameter, copy = model.get_parameter(copied), tensors.get_slice(name)
        first, mine = row_offset(parameter), local(parameter)
        for start in range(0, len(mine), COPY_ROWS):
            part = mine[start : start + COPY_ROWS]
            check_copy(file, copied, copy[first + start : first + start + len(part)].to(part.device), part)


@torch.no_grad()
def load_adapter_weights(model: nn.Module, folder: str | Path) -> set[str]:
    """Fills the adapter parameters of a materialised model, sharded or not, from a folder in PEFT's format.

    DoRA's are relative to the base weights, which must be loaded before. Returns the parameters' names. Raises UserError
    as check_adapter does, and if a base weight in the folder is not the model's, before it writes anything.
    """
    check_adapter(model, folder)
    parameters = adapter_parameters(model)
    file = Path(folder) / "adapter_model.safetensors"
    with open_tensors(file) as tensors:
        _check_copies(model, file, tensors)
        for name, parameter in parameters.items():
            whole = finite(tensors.get_tensor(peft_name(name)).view(parameter.shape), name, file)
            mine = local(like(whole, parameter)).to(local(parameter).device)
            local(parameter).copy_(mine - _lengths(model, name) if name.endswith(CHANGE) else mine)
    return set(parameters)


def load_adapter(model: Llama, folder: str | Path) -> Llama:
    """Adapts an unsharded base model with a LoRA or llama-adapter folder in PEFT's format, ours or PEFT's own.

    What is added is frozen. Raises UserError for a model that has an adapter already, for settings of PEFT's that we do
    not know, and if the folder's keys are not exactly the adapted model's, or their shapes differ.
    """
    if adapter := next(iter(adapter_parameters(model)), None):
        raise UserError(
            f"{folder}: the model has an adapter already ({adapter}): load one, into the base model, or merge_lora "
            "between two"
        )
    config = read_adapter_config(folder)
    with torch.device("meta"):  # before memory is allocated: its numbers may be anything
        check_adapter(adapt(type(model)(model.config), config), folder)
    adapt(model, config)
    load_adapter_weights(model, folder)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(False)
    return model


def _lora_config(folder: Path, settings: dict[str, Any]) -> LoraConfig:
    for key in ("modules_to_save", "lora_bias", *OTHER_PEFT):
        if settings.get(key):
            raise UserError(f"{folder}: {key} = {settings[key]!r} is not supported")
    if settings.get("init_lora_weights", True) not in KEEPS_BASE:
        raise UserError(
            f"{folder}: init_lora_weights = {settings['init_lora_weights']!r} is not supported: it changes the base"
        )
    targets = settings.get("target_modules")
    regex = isinstance(targets, str) and targets != "all-linear"
    # ensure_weight_tying: the head has the same as the embedding, and targets name one of them
    others = ("layers_to_transform", "exclude_modules", "ensure_weight_tying")
    other_targets = regex or any(settings.get(key) not in (None, [], False) for key in others)
    ranks, alphas = (settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    if other_targets or ranks or alphas:
        with open_tensors(
            folder / "adapter_model.safetensors"
        ) as tensors:  # the file's keys say which layers are meant
            names = [name for name in tensors.keys() if ".lora_" in name]  # noqa: SIM118
        layers = sorted({name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in names})
        targets = layers if other_targets else targets
        ranks, alphas = (_by_layer(folder, pattern, layers) for pattern in (ranks, alphas))
    numbers = (settings.get("r"), settings.get("lora_alpha"), settings.get("lora_dropout", 0.0))
    if not targets or not all(type(number) in (int, float) for number in numbers):
        raise UserError(
            f"{folder}/adapter_config.json needs the numbers r and lora_alpha, and target_modules that match"
        )
    try:
        return LoraConfig(
            rank=numbers[0],  # type: ignore[arg-type]
            alpha=numbers[1],  # type: ignore[arg-type]
            dropout=numbers[2],
            targets=(targets,) if isinstance(targets, str) else tuple(targets),
            rslora=bool(settings.get("use_rslora")),
            dora=bool(settings.get("use_dora")),
            ranks=ranks,
            alphas=alphas,
        )
    except UserError as error:  # in terms of a recipe's flags
        raise UserError(f"{folder}/adapter_config.json: {str(error).replace('--lora.', '')}") from None


def _by_layer(folder: Path, pattern: dict[str, Any], layers: list[str]) -> dict[str, Any]:
    """The values of a rank_pattern or alpha_pattern by the layers' names; of two keys that match, PEFT takes the first."""
    import regex  # comes with tiktoken, and has a timeout

    found = {}
    try:
        keys = [(regex.compile(rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]
        for layer in layers:
            matching = (value for key, value in keys if key.match(layer, timeout=0.3))
            if (value := next(matching, None)) is not None:
                found[layer] = value
    except (regex.error, TimeoutError) as error:
        raise UserError(f"{folder}/adapter_config.json: a key of {pattern} is no usable expression: {error}") from None
    return found


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
