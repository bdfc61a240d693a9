"""Hugging Face folders in, each rank reading only what it holds, and out; PEFT adapter folders in and out."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from tqdm import tqdm

from minillama.distributed import like, local, materialise, on_rank_zero, rank, reshard
from minillama.errors import UserError
from minillama.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.lora import LoraConfig, apply_lora
from minillama.model import Llama, LlamaConfig

READ_BYTES = 32 * 2**20
"""Size of the pieces in which tensors are read: host memory on top of the model's own is this, times READERS."""
READERS = 4
MAX_FILE_BYTES = 4 * 2**30
"""Size of the files that save_pretrained writes (one tensor may be more), and so the host memory it takes on rank 0."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
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


def _dtype(file: Path, name: str) -> torch.dtype:
    with _open(file) as tensors:
        return tensors.get_slice(name)[:1].dtype


def weights_fingerprint(folder: str | Path) -> str:
    """Tells base models apart by config, names, shapes, and the first row of each tensor: quick, however large they are."""
    digest = hashlib.sha256(repr(read_config(folder)).encode())
    for name, file in sorted(find_tensors(folder).items()):
        with _open(file) as tensors:
            rows = tensors.get_slice(name)
            digest.update(f"{name} {rows.get_shape()} {rows.get_dtype()}".encode())
            digest.update(rows[:1].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


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
        dtype = _dtype(files[name], name)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    materialise(model, device)
    load_weights(model, folder)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders out


def save_pretrained(
    model: Llama,
    folder: str | Path,
    base: str | Path,
    tokenizer: str | Path | None = None,
    *,
    unchanged: Collection[str] = (),
) -> None:
    """Writes a trained model, sharded or not, as a Hugging Face folder that transformers loads: whole, or not at all.

    Every rank must call it; with or without a process group. Parameters are gathered one at a time, and only rank 0
    keeps them, until they fill a file. Each tensor is cast to its dtype in `base`, the folder that the model was loaded
    from; the model itself stays as it is. The config and generation settings are copied from `base` too, and so are the
    tokenizer's files, unless `tokenizer` is given: another folder, or the tokenizer.json or tokenizer.model in it.

    unchanged: names of parameters to be copied from `base`, as those are that never trained: in the model they may have
    been rounded to the dtype it computes in.

    Raises UserError, on every rank, for a model with adapter parameters, a `base` of other shapes or one that `folder`
    would overwrite, and for what goes wrong on the disk.
    """
    folder, base = Path(folder).resolve(), Path(base).resolve()
    if adapter := next(iter(adapter_parameters(model)), None):
        raise UserError(
            f"the model has adapter parameters ({adapter}), of which a model folder knows nothing: save them with "
            "save_adapter, or merge_lora first"
        )
    if base.is_relative_to(folder):
        raise UserError(f"{folder} cannot be written: the base model is there, and its files are needed")
    sources = check_weights(model, base)
    dtypes = {name: _dtype(file, name) for name, file in sources.items()}
    copies = {file: base / file for file in ("config.json", "generation_config.json")}
    copies |= _tokenizer_files(base if tokenizer is None else Path(tokenizer))

    reshard(model)  # first: it is the sharded parameters that stay
    parameters = base_parameters(model)
    sizes = {name: p.numel() * dtypes[name].itemsize for name, p in parameters.items()}
    parts = split_by_size(sizes, MAX_FILE_BYTES)
    files = {f"model-{i:05}-of-{len(parts):05}.safetensors": names for i, names in enumerate(parts, start=1)}
    if len(parts) == 1:
        files = {"model.safetensors": parts[0]}
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}

    with _new_folder(folder, mark="config.json") as (path, on_disk):
        on_disk(_copy, copies, path)
        if len(parts) > 1:
            on_disk(_write_json, path / "model.safetensors.index.json", index)
        for file, names in files.items():
            tensors = {name: _gather(parameters[name], dtypes[name]) for name in names if name not in unchanged}
            on_disk(write_tensors, path / file, tensors, {name: sources[name] for name in names if name in unchanged})


def split_by_size(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names, in order, in groups of at most `limit` together, or of one name that is more."""
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > limit:
            groups.append([])
        groups[-1].append(name)
    return groups


def _tokenizer_files(path: Path) -> dict[str, Path]:
    """Where a tokenizer's files are, there or not, by the names that they have in a Hugging Face folder."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder, so the tokenizer cannot be copied from it")
    if path.is_dir():
        return {file: path / file for file in TOKENIZER_FILES}
    own_name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
    return _tokenizer_files(path.parent) | {own_name: path}


def _copy(sources: dict[str, Path], folder: Path) -> None:
    for file, source in sources.items():
        if source.exists():
            shutil.copyfile(source, folder / file)


def _gather(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole parameter on the host of rank 0, and nothing on the others. Every rank must call it."""
    whole = parameter.detach().to(dtype or parameter.dtype)  # before it travels: half the bytes, where fp32 is for bf16
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.cpu().contiguous() if _is_rank_zero() else torch.empty(0)


def _is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def _new_folder(folder: Path, mark: str) -> Iterator[tuple[Path, Callable[..., None]]]:
    """Makes `folder` whole or not at all. Every rank must enter it, and make the same calls.

    Gives the path to write to, and a function that calls another one on rank 0 while the others wait. If that fails,
    every rank raises UserError: none is left waiting in the next collective. At the end the path takes `folder`'s place.
    A folder that holds something, but no file `mark`, is none of ours: an error, never replaced.
    """
    path, old = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".old"))

    def on_disk(function: Callable[..., object], *args: Any) -> None:
        def attempt() -> None:
            try:
                function(*args)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder} cannot be written: {error}") from None

        if dist.is_initialized():
            on_rank_zero(attempt)
        else:
            attempt()

    def begin() -> None:
        if folder.exists() and any(folder.iterdir()) and not (folder / mark).exists():
            raise UserError(f"{folder} holds other files: give a new folder, or one to replace that has {mark}")
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)

    def finish() -> None:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)  # not removed before the new one is in its place
        path.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    try:
        on_disk(begin)
        yield path, on_disk
        on_disk(finish)
    except BaseException:
        if _is_rank_zero():
            shutil.rmtree(path, ignore_errors=True)
        raise


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: dict[str, Tensor], copied: dict[str, Path] | None = None) -> None:
    for name, source in (copied or {}).items():
        with _open(source) as there:
            tensors[name] = there.get_tensor(name)
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors leaves it to its owner alone


# ---------------------------------------------------------------------------------------------------------------------
# PEFT's adapter folders: adapter_config.json and adapter_model.safetensors

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
    tensors = {PEFT_PREFIX + n: _as_peft(n, _gather(p)) for n, p in adapter_parameters(model).items()}
    settings = peft_config(config, base_model, model.config.num_hidden_layers)
    with _new_folder(Path(folder).resolve(), mark="adapter_config.json") as (path, on_disk):
        on_disk(_write_json, path / "adapter_config.json", settings)
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
    with _open(file) as tensors:
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
    with _open(Path(folder) / "adapter_model.safetensors") as tensors:
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
