"""Hugging Face folders in, each rank reading only what it holds, and out."""

import hashlib
import json
import math
import os
import re
import reprlib
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from minillama.distributed import local, materialise, reshard, say
from minillama.errors import UserError
from minillama.files import is_plain, is_rank_zero, new_folder, open_file, read_bytes, read_json, room_for, write_json
from minillama.meta import MetaWeights, Weights, finite, is_meta_folder, read_meta_config
from minillama.model import LLAMA3_ROPE, Llama, LlamaConfig
from minillama.progress import progress
from minillama.tokenizer import load_tokenizer
from minillama.tokenizer_json import is_tiktoken, tokenizer_config, tokenizer_json

READ_BYTES = 32 * 2**20
"""Size of the pieces in which tensors are read: host memory on top of the model's own is this, times READERS."""
READERS = 4
WRITE_BYTES = 4 * 2**20
"""Size of the pieces that are written; small enough to stay in a processor's cache while they are cast and added to."""
MAX_FILE_BYTES = 4 * 2**30
"""Size of the files that save_pretrained writes (one tensor may be more), and so the host memory it takes on rank 0."""
INDEX = "model.safetensors.index.json"
MOST_LAYERS = 4096
LAYER = re.compile(r"model\.layers\.(\d+)\.")
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
    "additional_chat_templates/tool_use.jinja",
)


def read_config(folder: str | Path) -> LlamaConfig:
    """The config of a Hugging Face or Meta folder. Raises UserError for a folder or a config that is not a Llama's."""
    folder = Path(folder)
    if folder.is_file():
        kinds = {".gguf": "a GGUF file: tools/convert_checkpoint.py makes a model folder of it"}
        raise UserError(f"{folder} is {kinds.get(folder.suffix, 'a file: give the folder that it is in')}")
    if not folder.is_dir():
        raise UserError(
            f"the model folder {folder} does not exist: give a local folder in Hugging Face's format (config.json and "
            "*.safetensors) or Meta's (params.json and consolidated.*.pth), or ORG/NAME of the Hugging Face hub"
        )
    if is_meta_folder(folder):
        return read_meta_config(folder)
    if not (folder / "config.json").exists():
        others = {
            "adapter_config.json": "is an adapter: give the model it is for, and the adapter by its own flag",
            "checkpoint.json": "is a checkpoint: tools/convert_checkpoint.py makes a model of it",
            "run.json": "is the output of a run: give the model/ in it, or make one by tools/convert_checkpoint.py",
        }
        found = next((text for file, text in others.items() if (folder / file).exists()), "is no model folder")
        raise UserError(f"{folder} {found} (it has neither Hugging Face's config.json nor Meta's params.json)")
    try:
        config = LlamaConfig.from_dict(read_json(folder / "config.json"))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    _check_layers(config, folder)
    return config


def _check_layers(config: LlamaConfig, folder: Path) -> None:
    """Raises UserError if the weights, where they are there, have fewer layers: before a model of so many is built."""
    try:
        names = find_tensors(folder)
    except UserError:  # who reads the weights says so
        return
    there = len({match[1] for name in names if (match := LAYER.match(name))})
    if there < config.num_hidden_layers:
        raise UserError(
            f"the weights in {folder} do not fit their config: it has num_hidden_layers {config.num_hidden_layers}, and "
            f"they are of {there} layers"
        )
    if there > MOST_LAYERS:
        raise UserError(f"{folder} is of {there} layers: no Llama has so many, {MOST_LAYERS} is the most that is built")


def find_tensors(folder: str | Path) -> dict[str, Path]:
    """The file of every tensor of a Hugging Face folder: model.safetensors, or else several with an index.

    As in transformers the index does not count where there is model.safetensors, and what is in the files the index names
    is loaded, so that it must say of each tensor where it is. Raises UserError for what is missing or damaged.
    """
    folder = Path(folder)
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.exists():
        if index.exists():
            _note(f"note: {folder} holds model.safetensors and {INDEX}: model.safetensors is read, the index is not")
        return dict.fromkeys(tensor_names(single), single)
    if index.exists():
        files = {name: folder / file for name, file in read_index(index).items()}
        if missing := sorted({file.name for file in files.values() if not file.exists()}):
            raise UserError(f"{index} names files that are not there: {', '.join(missing)}")
        return files
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} holds its weights as pickles (pytorch_model.bin), which are not read: load it in transformers "
            "and save_pretrained it, which writes safetensors"
        )
    raise UserError(f"{folder} holds neither model.safetensors nor {INDEX}")


def read_index(index: Path) -> dict[str, str]:
    """The name of the file of each tensor. Raises UserError unless these are files of the index's own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f'{index} has no "weight_map"')
    if paths := [file for file in weight_map.values() if not (is_plain(file) and file.endswith(".safetensors"))]:
        raise UserError(
            f"{index} names {reprlib.repr(paths[0])}: only *.safetensors in the folder itself are read, move them there"
        )
    return weight_map


_note = cache(say)
"""Says what would else be said at each reading."""


def tensor_names(file: Path) -> list[str]:
    with open_tensors(file) as tensors:
        return list(tensors.keys())


def open_tensors(file: Path) -> Any:
    open_file(file).close()  # says what safetensors does not
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read, it may be truncated or not a safetensors file: {error}") from None


class SafetensorsWeights:
    """Tensors in safetensors files, each by name in the one given, read a few rows at a time; making one reads headers.

    Raises UserError for files that are damaged, or without the tensors that should be there.
    """

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self.names = list(self._files)
        self._described: dict[str, tuple[list[int], torch.dtype]] = {}
        for file in dict.fromkeys(self._files.values()):
            with open_tensors(file) as tensors:
                there = set(tensors.keys())
                for name in (name for name in self.names if self._files[name] == file):
                    if name not in there:
                        raise UserError(f"{name} is missing from {file}, where the index says it is")
                    rows = tensors.get_slice(name)
                    shape = rows.get_shape()  # of a single number there are no rows
                    self._described[name] = shape, (rows[:0] if shape else tensors.get_tensor(name)).dtype

    def shape(self, name: str) -> list[int]:
        return list(self._described[name][0])

    def dtype(self, name: str) -> torch.dtype:
        return self._described[name][1]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start, ...). Raises UserError for NaN and infinity."""
        with open_tensors(self._files[name]) as tensors:
            return finite(tensors.get_slice(name)[start:stop], name, self._files[name])


def open_weights(folder: str | Path) -> Weights:
    """The tensors of a Hugging Face or Meta folder. Raises UserError for what is missing or damaged."""
    folder = Path(folder)
    return MetaWeights(folder) if is_meta_folder(folder) else SafetensorsWeights(find_tensors(folder))


def weights_fingerprint(folder: str | Path) -> str:
    """Tells base models apart by config, names, shapes, and the first row of each tensor: quick, however large they are.

    The same for the same model in Hugging Face's format and in Meta's, which knows no max_position_embeddings.
    """
    weights, config = open_weights(folder), read_config(folder)
    computing = asdict(config) | {"rope_scaling": None}
    del computing["max_position_embeddings"]
    if scaling := config.rope_scaling:  # numbers that are whole or not, and keys that nothing is computed from
        numbers = {key: float(scaling[key]) for key in LLAMA3_ROPE if key in scaling}
        computing["rope_scaling"] = numbers | {"rope_type": scaling["rope_type"]}
    computing |= {name: float(computing[name]) for name in ("rms_norm_eps", "rope_theta")}
    digest = hashlib.sha256(json.dumps(computing, sort_keys=True).encode())
    with torch.device("meta"):  # tied heads and RoPE's frequencies, which some files hold too, are not among these
        names = dict(Llama(config).named_parameters()).keys() & set(weights.names)
    for name in sorted(names):
        digest.update(f"{name} {weights.shape(name)} {weights.dtype(name)}".encode())
        if weights.shape(name):
            digest.update(weights.rows(name, 0, 1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_weights(model: nn.Module, folder: str | Path, *, but: Collection[str] = ()) -> Weights:
    """The tensors in `folder`, which are those that `model` was built from; reads headers only.

    but: names of parameters that need not be there.

    Raises UserError with the names of missing, unexpected and wrongly shaped tensors.
    """
    weights, wanted = open_weights(folder), base_parameters(model)
    # Files may hold the tied head too, and old ones RoPE's frequencies, which we compute.
    spare = {name for name in weights.names if name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in wanted and "model.embed_tokens.weight" in wanted:
        spare.add("lm_head.weight")
    there = set(weights.names)
    problems = [f"{name} is missing" for name in wanted if name not in {*there, *but}]
    problems += [f"{name} is not part of the model" for name in weights.names if name not in wanted.keys() | spare]
    problems += [
        f"{name} has shape {weights.shape(name)}, the config asks for {list(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in there and weights.shape(name) != list(parameter.shape)
    ]
    if kinds := {weights.dtype(name) for name in there & wanted.keys()} - SAFETENSORS_DTYPES.keys():
        named = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise UserError(f"{folder} holds weights of {named}, as where they are quantised: give the plain checkpoint")
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"the weights in {folder} do not fit their config: {'; '.join(problems[:8])}{more}")
    if "lm_head.weight" in spare & there:
        _check_twin(weights, folder, 0, 1)  # the rest when it is loaded
    return weights


def _check_twin(weights: Weights, folder: str | Path, start: int, stop: int) -> None:
    """Raises UserError unless these rows of a tied head are those of the embedding."""
    twins = ("lm_head.weight", "model.embed_tokens.weight")
    same_shape = weights.shape(twins[0]) == weights.shape(twins[1])
    if not same_shape or not torch.equal(*(weights.rows(name, start, stop) for name in twins)):
        raise UserError(
            f"{folder}: lm_head.weight is not the embedding, yet config.json has tie_word_embeddings: set it to false"
        )


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
    weights, parameters = check_weights(model, folder), base_parameters(model)
    has_twin = "lm_head.weight" not in parameters and "lm_head.weight" in weights.names
    bytes_of = {name: local(p).numel() * p.element_size() for name, p in parameters.items()}

    total = sum(bytes_of.values())
    with progress(total=total, desc="loading weights", unit="B", unit_scale=True, leave=False) as bar:

        def load(name: str) -> None:
            target, offset = local(parameters[name]).detach(), _row_offset(parameters[name])
            step = max(1, READ_BYTES * len(target) // max(1, bytes_of[name]))
            for start in range(0, len(target), step):
                piece = target[start : start + step]
                place = offset + start, offset + start + len(piece)
                piece.copy_(weights.rows(name, *place))
                if has_twin and name == "model.embed_tokens.weight":
                    _check_twin(weights, folder, *place)
                bar.update(piece.numel() * piece.element_size())

        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(load, parameters):
                pass
    return set(parameters)


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
        name, weights = "model.embed_tokens.weight", open_weights(folder)
        if name not in weights.names:
            raise UserError(f"the weights in {folder} do not fit their config: {name} is missing")
        dtype = weights.dtype(name)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    check_weights(model, folder)  # before any memory is taken for sizes that the config alone has
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
    # merge_lora makes two tensors of a tied head and embedding of which one was adapted
    untied = read_config(base).tie_word_embeddings and not model.config.tie_word_embeddings
    weights = check_weights(model, base, but=("lm_head.weight",) if untied else ())
    embedding = "model.embed_tokens.weight"
    dtypes = {n: weights.dtype(n if n in weights.names else embedding) for n in base_parameters(model)}
    copies = companions(base, tokenizer)
    made = tokenizer_files(copies, folder)
    if as_it_is := not untied and not is_meta_folder(base):
        copies["config.json"] = base / "config.json"

    reshard(model)  # first: it is the sharded parameters that stay
    parameters = base_parameters(model)
    sizes = {name: p.numel() * dtypes[name].itemsize for name, p in parameters.items()}
    files = split_into_files(sizes)

    def write_with_copies(file: Path, tensors: dict[str, Tensor], copied: list[str], needed: int) -> None:
        with room_for(needed, file.parent):
            write_tensors(file, tensors | {name: weights.rows(name, 0, weights.shape(name)[0]) for name in copied})

    with new_folder(folder, mark="config.json") as (path, on_disk):
        on_disk(copy_files, copies, path, made)
        if not as_it_is:
            described = config_json(base, model.config, dtypes[embedding], tokenizer)
            on_disk(write_json, path / "config.json", described)
        if len(files) > 1:
            on_disk(write_json, path / INDEX, _index(files, sizes))
        needed = sum(sizes.values())
        for file, names in files.items():
            tensors = {name: gather(parameters[name], dtypes[name]) for name in names if name not in unchanged}
            on_disk(write_with_copies, path / file, tensors, [name for name in names if name in unchanged], needed)
            needed -= sum(sizes[name] for name in names)


def write_model(
    weights: Weights,
    config: LlamaConfig,
    folder: str | Path,
    base: str | Path,
    tokenizer: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes tensors that can be read a few rows at a time as a Hugging Face folder: whole, or not at all.

    The files that go with them are those of `base`, and of `tokenizer` if given, as in save_pretrained. Every rank must
    call it; rank 0 reads and writes. dtype: None keeps each tensor's. Raises UserError for what goes wrong on the disk.
    """
    base = Path(base)
    copies = companions(base, tokenizer)
    made = tokenizer_files(copies, Path(folder))
    described = config_json(base, config, dtype or weights.dtype("model.embed_tokens.weight"), tokenizer)
    with new_folder(Path(folder), mark="config.json") as (path, on_disk):
        on_disk(copy_files, copies, path, made)
        on_disk(write_hf, weights, described, path, dtype)


def write_hf(weights: Weights, config: dict[str, Any], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes config.json and the tensors into a folder that exists, WRITE_BYTES at a time.

    config: the contents of config.json. dtype: None keeps each tensor's.
    """
    dropped = ("lm_head.weight",) if config.get("tie_word_embeddings") else ()
    names = [name for name in weights.names if name not in dropped and not name.endswith("rotary_emb.inv_freq")]
    dtypes = {name: dtype or weights.dtype(name) for name in names}
    sizes = {name: math.prod(weights.shape(name)) * dtypes[name].itemsize for name in names}
    files = split_into_files(sizes)
    write_json(folder / "config.json", config)
    if len(files) > 1:
        write_json(folder / INDEX, _index(files, sizes))
    total = sum(sizes.values())
    bar = progress(total=total, desc="writing", unit="B", unit_scale=True, leave=False)
    with bar, room_for(total, folder):
        for file, inside in files.items():
            # The format: 8 bytes with the length of a JSON header, the header, then all tensors' bytes as it says.
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in inside:
                kind, shape = SAFETENSORS_DTYPES[dtypes[name]], weights.shape(name)
                header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end := end + sizes[name]]}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with (folder / file).open("wb") as opened:
                opened.write(len(text).to_bytes(8, "little") + text)
                for name in inside:
                    height = weights.shape(name)[0]
                    step = max(1, WRITE_BYTES * height // max(1, sizes[name]))
                    for start in range(0, height, step):
                        rows = weights.rows(name, start, min(start + step, height)).to(dtypes[name]).contiguous()
                        bar.update(opened.write(rows.view(torch.uint8).numpy().data))


SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


def config_json(
    base: Path, config: LlamaConfig, dtype: torch.dtype, tokenizer: str | Path | None = None
) -> dict[str, Any]:
    """config.json of a model of this config and dtype that was made from `base`: with all that base's own says."""
    kind = str(dtype).removeprefix("torch.")
    if not is_meta_folder(base):
        described = read_json(base / "config.json")
        key = "dtype" if "dtype" in described else "torch_dtype"  # transformers 5's name, and 4's
        return described | {key: kind, "tie_word_embeddings": config.tie_word_embeddings}
    described = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": kind} | asdict(config)
    if any(path.exists() for path in companions(base, tokenizer).values()):
        known = load_tokenizer(tokenizer or base)
        described |= {"bos_token_id": known.bos_id, "eos_token_id": known.eos_id}
    return described


def split_into_files(sizes: dict[str, int]) -> dict[str, list[str]]:
    """Which tensors, of so many bytes each, go into which safetensors file."""
    parts = split_by_size(sizes, MAX_FILE_BYTES)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": names for i, names in enumerate(parts, start=1)}


def _index(files: dict[str, list[str]], sizes: dict[str, int]) -> dict[str, Any]:
    weight_map = {name: file for file, names in files.items() for name in names}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}


def split_by_size(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names, in order, in groups of at most `limit` together, or of one name that is more."""
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > limit:
            groups.append([])
        groups[-1].append(name)
    return groups


def companions(base: Path, tokenizer: str | Path | None = None) -> dict[str, Path]:
    """Where the generation settings and the tokenizer's files are, there or not, by the names they have in a Hugging
    Face folder: those of `base`, or the tokenizer of another folder or file. Raises UserError if there is none."""
    path = base if tokenizer is None else Path(tokenizer)
    if tokenizer is not None:
        load_tokenizer(path)
    folder = path if path.is_dir() else path.parent
    found = {"generation_config.json": base / "generation_config.json"}
    found |= {file: folder / file for file in TOKENIZER_FILES}
    if not path.is_dir():
        found["tokenizer.json" if path.suffix == ".json" else "tokenizer.model"] = path
    elif not found["tokenizer.model"].exists():
        found["tokenizer.model"] = (
            folder / "original" / "tokenizer.model"
        )  # where Meta's own Hugging Face folders have it
    return found


def tokenizer_files(copies: dict[str, Path], target: Path) -> dict[str, dict[str, Any]]:
    """What to write beside these copies, where a tokenizer.model alone would not do for transformers."""
    there = {name for name, path in copies.items() if path.exists()}
    if "tokenizer.model" not in there or there & {"tokenizer.json", "tokenizer_config.json"}:
        return {}
    content = read_bytes(copies["tokenizer.model"])
    made = None if is_tiktoken(content) else tokenizer_json(content)
    if made is None:
        say(
            f"note: minillama reads the tokenizer.model of {target}, transformers needs the tokenizer.json of the Hugging "
            "Face model: give its folder by --tokenizer, or copy its tokenizer's files there"
        )
        return {}
    return {"tokenizer.json": made, "tokenizer_config.json": tokenizer_config(content)}


def copy_files(sources: dict[str, Path], folder: Path, made: Mapping[str, dict[str, Any]] | None = None) -> None:
    """made: JSON files to write beside the copies."""
    for file, source in sources.items():
        if source.exists():
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / file)
    for file, content in (made or {}).items():
        write_json(folder / file, content)


def gather(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole parameter on the host of rank 0, and nothing on the others. Every rank must call it."""
    whole = parameter.detach().to(dtype or parameter.dtype)  # before it travels: half the bytes, where fp32 is for bf16
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.cpu().contiguous() if is_rank_zero() else torch.empty(0)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors leaves it to its owner alone
