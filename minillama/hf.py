"""Hugging Face folders in, each rank reading only what it holds; PEFT adapter folders in and out."""

import json
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from tqdm import tqdm

from minillama.distributed import local, materialise, on_rank_zero, rank, reshard
from minillama.errors import UserError
from minillama.lora import LoraConfig, apply_lora
from minillama.model import Llama, LlamaConfig

READ_BYTES = 32 * 2**20
"""Size of the pieces in which tensors are read: host memory on top of the model's own is this, times READERS."""
READERS = 4
PEFT_PREFIX = "base_model.model."
OTHER_PEFT = (
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
"""Settings of PEFT's that change what an adapter computes, and that we do not know."""


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def read_config(folder: str | Path) -> LlamaConfig:
    """The config of a Hugging Face folder. Raises UserError for a folder or a config that is not a Llama's."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"the model folder {folder} does not exist: give a local folder in Hugging Face's format (config.json and "
            "*.safetensors)"
        )
    try:
        return LlamaConfig.from_dict(read_json(folder / "config.json"))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def find_tensors(folder: str | Path) -> dict[str, Path]:
    """The file of every tensor of a Hugging Face folder: model.safetensors, or several with an index."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f'{index} has no "weight_map"')
        files = {name: folder / str(file) for name, file in weight_map.items()}
        if missing := sorted({file.name for file in files.values() if not file.exists()}):
            raise UserError(f"{index} names files that are not there: {', '.join(missing)}")
        return files
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")
    return dict.fromkeys(_tensor_names(single), single)


def _tensor_names(file: Path) -> list[str]:
    with _open(file) as tensors:
        return list(tensors.keys())


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read, it may be truncated or not a safetensors file: {error}") from None


def check_weights(model: nn.Module, folder: str | Path) -> dict[str, Path]:
    """The file of every base parameter of `model`; reads headers only.

    Raises UserError with the names of missing, unexpected and wrongly shaped tensors.
    """
    files = find_tensors(folder)
    wanted = base_parameters(model)
    # Files may hold the tied head too, and old ones RoPE's frequencies, which we compute.
    spare = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in wanted and "model.embed_tokens.weight" in wanted:
        spare.add("lm_head.weight")
    problems = [f"{name} is missing" for name in wanted if name not in files]
    problems += [f"{name} is not part of the model" for name in files if name not in wanted and name not in spare]
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        if name in files:
            by_file.setdefault(files[name], []).append(name)
    for file, names in by_file.items():
        with _open(file) as tensors:
            there = set(tensors.keys())
            for name in names:
                if name not in there:
                    problems.append(f"{name} is missing from {file.name}, where the index says it is")
                elif (shape := tensors.get_slice(name).get_shape()) != list(wanted[name].shape):
                    problems.append(f"{name} has shape {shape}, the config asks for {list(wanted[name].shape)}")
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"the weights in {folder} do not fit their config: {'; '.join(problems[:8])}{more}")
    return {name: files[name] for name in wanted}


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that a checkpoint of the base model holds, by name: those the model had before it was adapted."""
    with torch.device("meta"):
        names = dict(type(model)(model.config).named_parameters())
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def adapter_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that adapters added to the base model, by name."""
    base = base_parameters(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in base}


def load_weights(model: nn.Module, folder: str | Path) -> set[str]:
    """Fills the base parameters of a materialised model, sharded or not, from a Hugging Face folder.

    Each rank reads only the rows its own shards hold, in pieces, casting to each parameter's dtype: host memory on top
    of the model's stays below READERS * READ_BYTES. Returns the names of the parameters filled. Raises UserError as
    check_weights does.
    """
    files = check_weights(model, folder)
    twin = None if "lm_head.weight" in files else find_tensors(folder).get("lm_head.weight")
    parameters = base_parameters(model)
    bytes_of = {name: local(p).numel() * p.element_size() for name, p in parameters.items()}

    with tqdm(
        total=sum(bytes_of.values()),
        desc="loading weights",
        unit="B",
        unit_scale=True,
        disable=rank() != 0,
        leave=False,
    ) as bar:

        def load(name: str) -> None:
            target, offset = local(parameters[name]).detach(), _row_offset(parameters[name])
            step = max(1, READ_BYTES * len(target) // max(1, bytes_of[name]))
            with ExitStack() as stack:
                rows = stack.enter_context(_open(files[name])).get_slice(name)
                head_rows = None
                if name == "model.embed_tokens.weight" and twin is not None:
                    head_rows = stack.enter_context(_open(twin)).get_slice("lm_head.weight")
                for start in range(0, len(target), step):
                    piece = target[start : start + step]
                    place = slice(offset + start, offset + start + len(piece))
                    piece.copy_(rows[place])
                    if head_rows is not None and not torch.equal(rows[place], head_rows[place]):
                        raise UserError(
                            f"{folder}: lm_head.weight is not the embedding, yet config.json has tie_word_embeddings: "
                            "set it to false"
                        )
                    bar.update(piece.numel() * piece.element_size())

        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(load, files):
                pass
    return set(files)


def _row_offset(parameter: Tensor) -> int:
    """The first row of the whole tensor that this rank holds."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0]


def from_pretrained(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Llama:
    """A model of one process, ready to call, in evaluation mode; needs no process group.

    dtype: of all parameters; None takes that of the embedding in the file. Raises UserError for a bad folder.
    """
    config = read_config(folder)
    if dtype is None:
        name = "model.embed_tokens.weight"
        files = find_tensors(folder)
        if name not in files:
            raise UserError(f"the weights in {folder} do not fit their config: {name} is missing")
        with _open(files[name]) as tensors:
            dtype = tensors.get_slice(name)[:1].dtype
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    materialise(model, device)
    load_weights(model, folder)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# PEFT's adapter folders: adapter_config.json and adapter_model.safetensors


def save_adapter(model: nn.Module, folder: str | Path, config: LoraConfig, base_model: str) -> None:
    """Writes the LoRA matrices in PEFT's format. Every rank must call it; rank 0 writes, whole folder or nothing.

    base_model: the name or path that goes into the config as base_model_name_or_path. Only the adapters are gathered.
    """
    reshard(model)
    tensors = {}
    for name, parameter in adapter_parameters(model).items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if rank() == 0:
            tensors[PEFT_PREFIX + name] = whole.detach().cpu().contiguous()

    def write() -> None:
        final = Path(folder)
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        settings = partial / "adapter_config.json"
        settings.write_text(json.dumps(peft_config(config, base_model), indent=2, sort_keys=True) + "\n")
        try:
            save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            shutil.rmtree(partial)
            raise UserError(f"the adapter cannot be written to {final}: {error}") from None
        shutil.copymode(settings, partial / "adapter_model.safetensors")  # safetensors leaves it to its owner alone
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)

    if torch.distributed.is_initialized():
        on_rank_zero(write)
    else:
        write()


def peft_config(config: LoraConfig, base_model: str) -> dict[str, Any]:
    """What goes into adapter_config.json: only keys that older versions of PEFT, and vLLM, know too."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": "all-linear" if "all-linear" in config.targets else list(config.targets),
        "use_rslora": config.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Adapts an unsharded model with a LoRA folder in PEFT's format, ours or PEFT's own.

    Raises UserError if the folder's keys are not exactly the adapted model's, or their shapes differ.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the adapter folder {folder} does not exist")
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: peft_type {config.get('peft_type')!r} is not supported, only LORA is")
    for key in (
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "lora_bias",
        *OTHER_PEFT,
    ):
        if config.get(key):
            raise UserError(f"{folder}: {key} = {config[key]!r} is not supported")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise UserError(
            f"{folder}: init_lora_weights = {config['init_lora_weights']!r} is not supported: it changes the base"
        )
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":  # a regular expression for the whole name
        targets = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    numbers = (config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0))
    if not targets or not all(type(number) in (int, float) for number in numbers):
        raise UserError(
            f"{folder}/adapter_config.json needs the numbers r and lora_alpha, and target_modules that match"
        )
    lora = LoraConfig(
        rank=numbers[0],  # type: ignore[arg-type]
        alpha=numbers[1],  # type: ignore[arg-type]
        dropout=numbers[2],
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        rslora=config.get("use_rslora", False),
    )
    apply_lora(model, lora)
    wanted = adapter_parameters(model)
    file = folder / "adapter_model.safetensors"
    with _open(file) as tensors:
        there = set(tensors.keys())
        names = {PEFT_PREFIX + name for name in wanted}
        if there != names:
            raise UserError(f"{file} does not fit the model: {_difference(names - there, there - names)}")
        for name, parameter in wanted.items():
            value = tensors.get_tensor(PEFT_PREFIX + name)
            if value.shape != parameter.shape:
                raise UserError(
                    f"{file} does not fit the model: {name} has shape {list(value.shape)}, not {list(parameter.shape)}"
                )
            parameter.data.copy_(value)
            parameter.requires_grad_(False)
    return model


def _difference(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    parts = [f"{name} is missing" for name in sorted(missing)] + [
        f"{name} is unexpected" for name in sorted(unexpected)
    ]
    return "; ".join(parts[:6]) + (f", and {len(parts) - 6} more" if len(parts) > 6 else "")
