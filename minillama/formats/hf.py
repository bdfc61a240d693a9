"""Reads Hugging Face folders, each rank only the rows that it holds."""

import hashlib
import json
import re
import reprlib
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minillama.errors import UserError
from minillama.files import is_plain, open_file, read_json
from minillama.formats.bitsandbytes import BitsandbytesWeights, settings_problem
from minillama.formats.meta import MetaWeights, Weights, finite, is_meta_folder, read_meta_config
from minillama.formats.quantized import Quantize, QuantizedFill, quantize_base
from minillama.model.config import LLAMA3_ROPE, LlamaConfig
from minillama.model.llama import Llama
from minillama.model.quant import shapes
from minillama.parallel.heartbeat import stand
from minillama.parallel.initialise import materialise
from minillama.parallel.processes import say
from minillama.parallel.sharding import local, row_offset
from minillama.progress import progress

READ_BYTES = 32 * 2**20
"""Bytes of the pieces in which tensors are read: loading takes READERS times as much host memory on top of the model."""
READERS = 4
INDEX = "model.safetensors.index.json"
MOST_LAYERS = 4096
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
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
            "run.json": "is the output of a run: give the model/ in it; of an adapter the base, and adapter/ by "
            "--adapter; or make a model of a checkpoint by tools/convert_checkpoint.py",
        }
        found = next((text for file, text in others.items() if (folder / file).exists()), "is no model folder")
        raise UserError(f"{folder} {found} (it has neither Hugging Face's config.json nor Meta's params.json)")
    try:
        config = LlamaConfig.from_dict(read_json(folder / "config.json"))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    quantization(folder)
    _check_layers(config, folder)
    return config


def _check_layers(config: LlamaConfig, folder: Path) -> None:
    """Raises UserError if the weights are there and have fewer layers, before a model of so many layers is built."""
    try:
        names = find_tensors(folder)
    except UserError:  # reported when the weights are read
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

    As in transformers, the index is ignored if there is model.safetensors. All tensors in the files that the index names
    are loaded, so it must say where each tensor is. Raises UserError for what is missing or damaged.
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
"""Prints a note once that would be printed at each reading otherwise."""


def tensor_names(file: Path) -> list[str]:
    with open_tensors(file) as tensors:
        return list(tensors.keys())


def open_tensors(file: Path) -> Any:
    open_file(file).close()  # its message names what safetensors' does not
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read, it may be truncated or not a safetensors file: {error}") from None


class SafetensorsWeights:
    """Tensors in safetensors files, each in the file given for its name, read a few rows at a time. __init__ reads headers.

    Raises UserError for files that are damaged or lack the tensors that should be there.
    """

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self.names = list(self._files)
        self._described: dict[str, tuple[list[int], torch.dtype]] = {}
        self._last = threading.local()
        for file in dict.fromkeys(self._files.values()):
            with open_tensors(file) as tensors:
                there = set(tensors.keys())
                for name in (name for name in self.names if self._files[name] == file):
                    if name not in there:
                        raise UserError(f"{name} is missing from {file}, where the index says it is")
                    rows = tensors.get_slice(name)
                    shape = rows.get_shape()  # a single number has no rows
                    self._described[name] = shape, (rows[:0] if shape else tensors.get_tensor(name)).dtype

    def shape(self, name: str) -> list[int]:
        return list(self._described[name][0])

    def dtype(self, name: str) -> torch.dtype:
        return self._described[name][1]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start, ...). Raises UserError for NaN and infinity."""
        file, last = self._files[name], self._last
        # The file that a thread has read last stays open. What was read of it stays mapped, so not for long.
        if getattr(last, "file", None) != file or last.read >= READ_BYTES:
            last.file, last.tensors, last.read = file, open_tensors(file), 0
        rows = finite(last.tensors.get_slice(name)[start:stop], name, file)
        last.read += rows.nbytes
        return rows


def open_weights(folder: str | Path) -> Weights:
    """The tensors of a Hugging Face or Meta folder. Raises UserError for what is missing or damaged."""
    folder = Path(folder)
    if is_meta_folder(folder):
        return MetaWeights(folder)
    weights, settings = SafetensorsWeights(find_tensors(folder)), quantization(folder)
    return BitsandbytesWeights(weights, settings, folder) if settings else weights


def quantization(folder: Path) -> dict[str, Any]:
    """What a folder's config.json, or such a file, says of how it is quantised: {} of a plain one.

    Raises UserError for what we do not read.
    """
    file = folder if folder.suffix == ".json" else folder / "config.json"
    settings = read_json(file).get("quantization_config") if file.is_file() else {}
    if settings and (problem := settings_problem(settings)):
        raise UserError(
            f'{folder}: "quantization_config": {problem}: only NF4 and int8 in bitsandbytes\' format are read: give '
            "the plain one, or one in these"
        )
    return settings or {}


def weights_fingerprint(folder: str | Path) -> str:
    """A hash of config, names, shapes, and the first row of each tensor: quick for models of any size.

    It is the same for a model in Hugging Face's format and in Meta's, which has no max_position_embeddings.
    """
    weights, config = open_weights(folder), read_config(folder)
    computing = asdict(config) | {"rope_scaling": None}
    del computing["max_position_embeddings"]
    if scaling := config.rope_scaling:  # 1 and 1.0 are the same; keys that do not affect the computation are left out
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
    """The tensors in `folder`, checked against the base parameters of `model`; reads headers only.

    but: names of parameters that need not be there.

    Raises UserError with the names of missing, unexpected and wrongly shaped tensors.
    """
    weights, wanted = open_weights(folder), base_parameters(model)
    # Files may also hold the tied head, and old ones RoPE's frequencies, which we compute.
    spare = {name for name in weights.names if name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in wanted and "model.embed_tokens.weight" in wanted:
        spare.add("lm_head.weight")
    there = set(weights.names)
    problems = [f"{name} is missing" for name in wanted if name not in {*there, *but}]
    problems += [f"{name} is not part of the model" for name in weights.names if name not in wanted.keys() | spare]
    whole = shapes(model)
    problems += [
        f"{name} has shape {weights.shape(name)}, the config asks for {list(whole[name])}"
        for name in wanted
        if name in there and weights.shape(name) != list(whole[name])
    ]
    if kinds := {weights.dtype(name) for name in there & wanted.keys()} - SAFETENSORS_DTYPES.keys():
        named = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise UserError(
            f"{folder} holds weights of {named}, as where they are quantised: give the plain checkpoint, or "
            "one in bitsandbytes' format"
        )
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"the weights in {folder} do not fit their config: {'; '.join(problems[:8])}{more}")
    if "lm_head.weight" in spare & there:
        _check_tied(weights, folder, 0, 1)  # the rest is checked when it is loaded
    return weights


def _check_tied(weights: Weights, folder: str | Path, start: int, stop: int) -> None:
    """Raises UserError unless these rows of a tied head are those of the embedding."""
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    same_shape = weights.shape(tied[0]) == weights.shape(tied[1])
    if not same_shape or not torch.equal(*(weights.rows(name, start, stop) for name in tied)):
        raise UserError(
            f"{folder}: lm_head.weight is not the embedding, yet config.json has tie_word_embeddings: set it to false"
        )


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the base model, by name: those the model had before it was adapted."""
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
    of the model's is about READERS * READ_BYTES. Returns the names of the parameters and buffers filled. Every rank must
    call it. Raises UserError as check_weights does.
    """
    stand("loading the weights")
    weights, parameters = check_weights(model, folder), base_parameters(model)
    quantized = QuantizedFill(model, weights)
    has_tied_head = "lm_head.weight" not in parameters and "lm_head.weight" in weights.names
    bytes_of = {name: local(p).numel() * p.element_size() for name, p in parameters.items()}

    total = sum(bytes_of.values())
    with progress(total=total, desc="loading weights", unit="B", unit_scale=True, leave=False) as bar:

        def load(name: str) -> None:
            target, offset = local(parameters[name]).detach(), row_offset(parameters[name])
            step = max(1, READ_BYTES * len(target) // max(1, bytes_of[name]))
            if layer := quantized.layers.get(name):  # of whose pieces several copies are made
                step = max(1, READ_BYTES // (64 * layer.in_features))
            for start in range(0, len(target), step):
                piece = target[start : start + step]
                place = offset + start, offset + start + len(piece)
                if layer:
                    quantized.fill(name, piece, *place)
                else:
                    piece.copy_(weights.rows(name, *place))
                if has_tied_head and name == "model.embed_tokens.weight":
                    _check_tied(weights, folder, *place)
                bar.update(piece.numel() * piece.element_size())

        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(load, parameters):
                pass
    return set(parameters) | quantized.finish()


def from_pretrained(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantize: Quantize = "none",
) -> Llama:
    """A model of one process, ready to call, in evaluation mode; needs no process group.

    dtype: of all parameters; None takes that of the embedding in the file. quantize: how the blocks' linear layers are
    held; none: as in the folder. Raises UserError for a bad folder.
    """
    config = read_config(folder)
    if dtype is None:
        name, weights = "model.embed_tokens.weight", open_weights(folder)
        if name not in weights.names:
            raise UserError(f"the weights in {folder} do not fit their config: {name} is missing")
        dtype = weights.dtype(name)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    # before memory is allocated for sizes that only the config states
    quantize_base(model, check_weights(model, folder), quantize)
    materialise(model, device)
    load_weights(model, folder)
    return model.eval().requires_grad_(False)
