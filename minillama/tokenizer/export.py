"""A sentencepiece tokenizer.model as the tokenizer.json that transformers and vLLM read.

transformers 5 reads a tokenizer.model too, but takes its merges in the order of the ids instead of the scores, and
ignores whether white space is collapsed: texts with several spaces in a row get other ids.
"""

import re
from typing import Any


def is_tiktoken(content: bytes) -> bool:
    """Whether a tokenizer.model is Llama 3's: lines of a token in base64 and its rank."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\s", content) is not None


def tokenizer_json(model: bytes, *, add_bos: bool = True) -> dict[str, Any] | None:
    """tokenizer.json of a sentencepiece BPE, in the form of those published for Llama 2. None for what is not converted:
    other kinds of file, and a model that normalises characters (NFKC) or is no BPE."""
    import sentencepiece

    try:
        known = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = range(known.get_piece_size())
        pieces = [known.id_to_piece(id_) for id_ in ids]
    except (RuntimeError, UnicodeDecodeError):
        return None
    sample = "\ufb01 \uff21"  # a ligature and a wide letter, which NFKC would replace
    dummy_prefix = known.normalize("a").startswith("▁")
    if known.normalize(sample).removeprefix("▁") != sample.replace(" ", "▁"):
        return None
    special = {id_ for id_ in ids if known.is_control(id_) or known.is_unknown(id_)}
    scores = {
        pieces[id_]: known.get_score(id_)
        for id_ in ids
        if id_ not in special and not known.is_byte(id_) and not known.is_unused(id_)
    }
    merges = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    if not merges:
        return None
    merges.sort(key=lambda merge: merge[0], reverse=True)

    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
    if known.normalize("a  b").endswith("a▁b"):  # remove_extra_whitespaces
        ends = {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""}
        runs = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        normalizers = [ends, runs, *normalizers]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(id_, pieces[id_], special=True) for id_ in sorted(special)],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": bos_first(pieces[known.bos_id()], known.bos_id()) if add_bos else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[known.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(map(known.is_byte, ids)),
            "ignore_merges": False,
            "vocab": {piece: id_ for id_, piece in enumerate(pieces)},
            "merges": [[left, right] for _, left, right in merges],
        },
    }


def tokenizer_config(model: bytes) -> dict[str, Any]:
    """tokenizer_config.json that goes with it."""
    import sentencepiece

    known = sentencepiece.SentencePieceProcessor(model_proto=model)
    named = {"bos_token": known.bos_id(), "eos_token": known.eos_id(), "unk_token": known.unk_id()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": known.bos_id() >= 0,
        "clean_up_tokenization_spaces": False,
    } | {name: known.id_to_piece(id_) for name, id_ in named.items() if id_ >= 0}


def added_token(id_: int, content: str, *, special: bool) -> dict[str, Any]:
    marks = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": content, **marks, "special": special}


def bos_first(bos: str, bos_id: int) -> dict[str, Any]:
    """The post-processor that puts BOS before each text."""

    def piece(kind: str, name: str, type_id: int) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": type_id}}

    single = [piece("SpecialToken", bos, 0), piece("Sequence", "A", 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, piece("SpecialToken", bos, 1), piece("Sequence", "B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
