"""Convert a checkpoint between Hugging Face's format and Meta's, or a GGUF file or a run's checkpoint to Hugging Face's.

    python tools/convert_checkpoint.py Llama-3.2-1B meta/Llama-3.2-1B
    python tools/convert_checkpoint.py meta/Llama-3.2-1B hf/Llama-3.2-1B --tokenizer Llama-3.2-1B
    python tools/convert_checkpoint.py out/full/checkpoints/step-00000100 hf/full-100
    python tools/convert_checkpoint.py Llama-3.1-70B models/Llama-3.1-70B-nf4 --quantize nf4
    python tools/convert_checkpoint.py SmolLM2-135M-Instruct.Q4_1.gguf models/SmolLM2-135M-Instruct

SOURCE decides: a Hugging Face folder becomes a Meta folder, or with --quantize a quantised one; a Meta folder, a
GGUF file or a checkpoint a Hugging Face folder, with the base that the checkpoint was trained on and LoRA merged into it;
a llama-adapter's checkpoint an adapter folder. Tensors are read and written a few rows at a time. GGUF needs the gguf
package (pip install gguf); its quantisation error stays.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from minillama.adapters.merge import export_checkpoint
from minillama.errors import UserError
from minillama.files import check_unused, folder_size, new_folder, size_text, write_json
from minillama.formats.hf import check_weights, read_config
from minillama.formats.hf_export import companions, copy_files, write_hf, write_model
from minillama.formats.hub import find_model
from minillama.formats.meta import finite, interleaved, is_meta_folder, write_meta
from minillama.formats.quantized import Quantize, quantize_base
from minillama.help import filled
from minillama.model.llama import Llama
from minillama.parallel.failures import user_errors
from minillama.tokenizer.export import added_token, bos_first, tokenizer_json
from minillama.training.resume import saved_steps

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def convert_checkpoint(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    *,
    dtype: Literal["same", "bfloat16", "float16", "float32"] = "same",
    quantize: Quantize = "none",
    files: int = 1,
    tokenizer: Path | None = None,
    base: Path | None = None,
    adapter_only: bool = False,
) -> None:
    """Convert a checkpoint from Hugging Face's format to Meta's, or from Meta's, GGUF or a run's to Hugging Face's.

    Args:
        source: a Hugging Face folder, a Meta folder, a GGUF file (of Llama's architecture), or a
            run's OUTPUT_DIR/checkpoints/step-... of either format; or ORG/NAME of the
            Hugging Face hub.
        target: the folder to write; it must not exist yet, or be empty.
        dtype: of the weights written. same: as they are, of a checkpoint as in the base; bfloat16 from GGUF.
        quantize: write the linear layers of a Hugging Face or Meta model in 4 bits a weight (nf4) or 8 (int8), in
            bitsandbytes' format, which every recipe and transformers read; what it loses stays lost.
        files: of a Meta folder: consolidated.00.pth and so on, for as many processes of its model parallelism.
        tokenizer: folder or file to take the tokenizer from; None: the source's own, or the run's.
        base: the model that a run's checkpoint was trained on; None: where it was then.
        adapter_only: of a LoRA's checkpoint: write the adapter in PEFT's format, do not merge it.
    """
    check_unused(target, source)
    source = find_model(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder: give a folder, a GGUF file, or ORG/NAME of the hub")
    if source.name == "checkpoints" and (steps := saved_steps(source.parent)):
        raise UserError(f"{source} holds a run's checkpoints: give one of them, the newest is {steps[max(steps)]}")
    is_run = (source / "checkpoint.json").exists()
    to_meta = source.is_dir() and not is_run and not is_meta_folder(source) and quantize == "none"
    if quantize != "none" and (is_run or source.is_file() or dtype != "same"):
        raise UserError(
            f"--quantize {quantize} is for a Hugging Face or Meta SOURCE, and goes without --dtype: convert to such a "
            "folder before"
        )
    if files != 1 and (not to_meta or files < 1):
        raise UserError(f"--files {files} is for a Meta TARGET, made of a Hugging Face SOURCE, and must be at least 1")
    if not is_run and (base or adapter_only):
        raise UserError("--base and --adapter-only are for a run's checkpoint, and SOURCE is none")
    wanted = None if dtype == "same" else getattr(torch, dtype)
    if source.is_file():
        convert_gguf(source, target, wanted or torch.bfloat16)
    elif is_run:
        export_checkpoint(source, target, base and find_model(base), tokenizer, dtype=wanted, adapter_only=adapter_only)
    else:
        config = read_config(source)
        with torch.device("meta"):
            model = Llama(config)
            weights = check_weights(model, source)
            quantize_base(model, weights, quantize)  # raises for what cannot be
        if to_meta:
            copies = companions(source, tokenizer)
            with new_folder(target, mark="params.json") as (folder, on_disk):
                on_disk(copy_files, copies, folder)
                on_disk(write_meta, weights, config, folder, wanted, files)
        else:
            write_model(weights, config, target, source, tokenizer, dtype=wanted, quantize=quantize)
    print(f"{target}: {size_text(folder_size(target))}")


# --- GGUF


def convert_gguf(source: Path, target: Path, dtype: torch.dtype) -> None:
    reader = open_gguf(source)
    try:
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = read_gguf_config(fields, tensors)
        tokenizer, tokenizer_config = read_tokenizer(fields)
        config |= {
            "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": end_tokens(fields),
            "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        weights = GgufWeights(tensors, config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{source} is damaged, or of a kind that is not known: {error!r:.200}") from None
    generation_config = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with new_folder(target, mark="config.json") as (folder, on_disk):
        on_disk(write_json, folder / "generation_config.json", generation_config)
        if isinstance(tokenizer, bytes):
            on_disk((folder / "tokenizer.model").write_bytes, tokenizer)
            tokenizer = tokenizer_json(tokenizer, add_bos=tokenizer_config["add_bos_token"])
        if tokenizer:
            on_disk(write_json, folder / "tokenizer.json", tokenizer)
        on_disk(write_json, folder / "tokenizer_config.json", tokenizer_config)
        on_disk(write_hf, weights, config, folder, dtype)


def open_gguf(source: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError("reading GGUF needs a package: pip install gguf") from error
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{source} is not a GGUF file: give a folder, or a file of that format")

    class Reader(gguf.GGUFReader):  # theirs loops past the end of the file, as often as a length says
        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            found = super()._get(offset, dtype, count, *args, **kwargs)
            if len(found) < count:
                raise ValueError("the file ends before")
            return found

    try:
        return Reader(source)
    except (ArithmeticError, LookupError, RecursionError, ValueError):
        raise UserError(f"{source} is a truncated or damaged GGUF file, or of an unknown version") from None


def read_gguf_config(fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM; raises for what that class cannot express."""
    architecture = fields.get("general.architecture")
    if architecture is None:
        raise UserError("the GGUF file is empty: it has no field general.architecture")
    if architecture != "llama":
        raise UserError(f"the GGUF file holds a {architecture!r} model; only 'llama' can be converted")
    if fields.get("llama.expert_count", 0):
        raise UserError("the GGUF file holds a mixture of experts; only dense Llama models can be converted")

    width, heads = need(fields, "llama.embedding_length"), need(fields, "llama.attention.head_count")
    head_dim = fields.get("llama.attention.key_length", width // heads)
    if fields.get("llama.attention.value_length", head_dim) != head_dim:
        raise UserError("llama.attention.value_length differs from key_length; Llama has one head width")
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise UserError("llama.rope.dimension_count is not the head width; Llama rotates whole heads")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(need(fields, "tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": need(fields, "llama.feed_forward_length"),
        "num_hidden_layers": need(fields, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": need(fields, "llama.context_length"),
        "rms_norm_eps": shortest(need(fields, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(fields.get("llama.rope.freq_base", 10000.0)),
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    config["rope_scaling"] = read_rope_scaling(fields, tensors, config)
    return config


def read_rope_scaling(fields: dict[str, Any], tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    kind = fields.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": shortest(need(fields, "llama.rope.scaling.factor"))}
    if kind != "none":
        raise UserError(f"llama.rope.scaling.type is {kind!r}; only 'none' and 'linear' can be converted")
    if "rope_freqs.weight" not in tensors:
        return None
    # Llama 3.1's scaling is stored as its result, one divisor a frequency. The rule has one set of values in
    # all published models except for the factor, so apply it and compare.
    divisors = dequantise(tensors["rope_freqs.weight"], tensors["rope_freqs.weight"].data)
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    frequencies = config["rope_theta"] ** -(np.arange(0, config["head_dim"], 2) / config["head_dim"])
    turns = original * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError("the tensor rope_freqs.weight is not Llama 3.1's RoPE scaling; it cannot be converted")
    return {
        "rope_type": "llama3",
        "factor": shortest(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


class GgufWeights:
    """The tensors of a GGUF file under their Hugging Face names, dequantised to fp32 a few rows at a time."""

    def __init__(self, tensors: dict[str, Any], config: dict[str, Any]) -> None:
        width, inner, self._head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        q = config["num_attention_heads"] * self._head_dim
        kv = config["num_key_value_heads"] * self._head_dim
        found = {
            "model.embed_tokens.weight": ("token_embd.weight", [config["vocab_size"], width]),
            "model.norm.weight": ("output_norm.weight", [width]),
        }
        if not config["tie_word_embeddings"]:
            found["lm_head.weight"] = ("output.weight", [config["vocab_size"], width])
        layers = len({name.split(".")[1] for name in tensors if name.startswith("blk.")})
        if config["num_hidden_layers"] > layers:
            raise UserError(f"the GGUF file says {config['num_hidden_layers']} layers, and has tensors of {layers}")
        for layer in range(config["num_hidden_layers"]):
            for theirs, ours, shape in (
                ("attn_norm", "input_layernorm", [width]),
                ("attn_q", "self_attn.q_proj", [q, width]),
                ("attn_k", "self_attn.k_proj", [kv, width]),
                ("attn_v", "self_attn.v_proj", [kv, width]),
                ("attn_output", "self_attn.o_proj", [width, q]),
                ("ffn_norm", "post_attention_layernorm", [width]),
                ("ffn_gate", "mlp.gate_proj", [inner, width]),
                ("ffn_up", "mlp.up_proj", [inner, width]),
                ("ffn_down", "mlp.down_proj", [width, inner]),
            ):
                found[f"model.layers.{layer}.{ours}.weight"] = (f"blk.{layer}.{theirs}.weight", shape)

        wanted = {theirs for theirs, _ in found.values()}
        if missing := sorted(wanted - tensors.keys()):
            raise UserError(f"the GGUF file lacks {len(missing)} tensors of a Llama: {', '.join(missing[:4])} ...")
        if unknown := sorted(tensors.keys() - wanted - {"rope_freqs.weight"}):
            raise UserError(f"the GGUF file has {len(unknown)} tensors no Llama has: {', '.join(unknown[:4])} ...")
        for theirs, shape in found.values():
            there = [int(size) for size in reversed(tensors[theirs].shape)]  # GGUF counts the last dimension first
            if there != shape:
                raise UserError(f"{theirs} has shape {tuple(there)}; its configuration says {tuple(shape)}")
        self.names = list(found)
        self._found = {name: (tensors[theirs], shape) for name, (theirs, shape) in found.items()}

    def shape(self, name: str) -> list[int]:
        return list(self._found[name][1])

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor, shape = self._found[name]
        places = torch.arange(start, stop)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            places = interleaved(places, self._head_dim)  # GGUF rotates neighbours, as Meta does
        data = tensor.data[places.numpy()]  # copied: the file is mapped read-only
        return finite(torch.from_numpy(dequantise(tensor, data)).view(-1, *shape[1:]), name, "the GGUF file")


def dequantise(tensor: Any, data: np.ndarray) -> np.ndarray:
    """data: some rows of tensor.data."""
    from gguf.quants import dequantize

    try:
        return dequantize(data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise UserError(f"{tensor.name} is quantised as {kind}, which gguf cannot dequantise") from error


def read_tokenizer(fields: dict[str, Any]) -> tuple[dict[str, Any] | bytes, dict[str, Any]]:
    """tokenizer.json of a byte-level BPE, or tokenizer.model of sentencepiece; and tokenizer_config.json."""
    model = fields.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UserError(
            f"the tokenizer is {model!r}; only byte-level BPE ('gpt2') and sentencepiece ('llama') can be read"
        )
    tokens = need(fields, "tokenizer.ggml.tokens")
    by_default = model == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"  # as llama.cpp has it
    add_bos = fields.get("tokenizer.ggml.add_bos_token", by_default)
    if model == "llama":
        tokenizer: dict[str, Any] | bytes = read_sentencepiece(fields)
    else:
        tokenizer = read_byte_level(fields, add_bos)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": need(fields, "llama.context_length"),
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None:
            tokenizer_config[f"{ours}_token"] = tokens[index]
    if "tokenizer.chat_template" in fields:
        tokenizer_config["chat_template"] = fields["tokenizer.chat_template"]
    return tokenizer, tokenizer_config


def read_sentencepiece(fields: dict[str, Any]) -> bytes:
    """tokenizer.model of a sentencepiece BPE, whose pieces, scores and types GGUF has taken over."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError as error:
        raise UserError("a sentencepiece tokenizer needs a package: pip install protobuf") from error
    types = need(fields, "tokenizer.ggml.token_type")
    model = proto.ModelProto()
    for piece, score, kind in zip(
        need(fields, "tokenizer.ggml.tokens"), need(fields, "tokenizer.ggml.scores"), types, strict=True
    ):
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(types), 6 in types
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{theirs}_token_id", 0 if ours == "unk" else -1)
        setattr(trainer, f"{ours}_id", index)
        if index >= 0:
            setattr(trainer, f"{ours}_piece", model.pieces[index].piece)
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    return model.SerializeToString()


def read_byte_level(fields: dict[str, Any], add_bos: bool) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE."""
    pre = fields.get("tokenizer.ggml.pre")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if pre == "smollm":
        splits = [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    elif pre == "llama-bpe":
        split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
        splits = [split, byte_level | {"use_regex": False}]
    else:
        raise UserError(f"the pre-tokenizer is {pre!r}; only 'smollm' and 'llama-bpe' can be converted")

    tokens = need(fields, "tokenizer.ggml.tokens")
    control, user_defined = 3, 4  # gguf.TokenType
    added = [
        added_token(index, tokens[index], special=kind == control)
        for index, kind in enumerate(need(fields, "tokenizer.ggml.token_type"))
        if kind in (control, user_defined)
    ]
    post_processor: dict[str, Any] = byte_level | {"use_regex": True}
    if add_bos:
        bos_id = need(fields, "tokenizer.ggml.bos_token_id")
        post_processor = bos_first(tokens[bos_id], bos_id)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": post_processor,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in need(fields, "tokenizer.ggml.merges")],
        },
    }


def end_tokens(fields: dict[str, Any]) -> int | list[int] | None:
    """The tokens that end a generation: end of text, and end of turn or message if the file names them."""
    found = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(index for index in found if index is not None))
    return ids if len(ids) > 1 else (ids[0] if ids else None)


def need(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise UserError(f"the GGUF file has no field {name}")
    return fields[name]


def shortest(value: float) -> float:
    """GGUF floats are fp32: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


if __name__ == "__main__":
    with user_errors():
        tyro.cli(filled(convert_checkpoint))
