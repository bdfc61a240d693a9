"""What the files beside a tokenizer's vocabulary say: its special tokens by role, added tokens, chat templates."""

from pathlib import Path
from typing import Any, Literal

from minillama.errors import UserError
from minillama.files import read_bytes, read_json

FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model", "added_tokens.json")
NAMES = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
TEMPLATES = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
"""All files that can affect ids"""

TOKEN = (None, str, {"content": str})
SHAPE: dict[str, Any] = {
    **dict.fromkeys(("bos_token", "eos_token", "pad_token"), TOKEN),
    "added_tokens_decoder": {...: {"content": str}},
    "add_bos_token": bool,
    "tokenizer_class": str,
}
"""The types of the settings that we read, if they are there"""

LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
CODE_LLAMA = ("CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
NO_RULES = (None, "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
"""Values of tokenizer_class with a sentencepiece model: tokenizer.json decides on spaces under NO_RULES"""
Space = Literal["each", "always", "first", "never"]
"""Before which parts of a text a space is put: see engines.py"""


def read_names(folder: Path) -> dict[str, Any]:
    """What the files beside the vocabulary say: special tokens by role, added tokens, the chat template."""
    files = {file: read_json(folder / file, SHAPE) for file in NAMES if (folder / file).exists()}
    # As in transformers: older files count only if tokenizer_config.json has no added_tokens_decoder.
    legacy = "added_tokens_decoder" not in files.get("tokenizer_config.json", {})
    order = (*NAMES[:2], "tokenizer_config.json", "special_tokens_map.json") if legacy else NAMES
    names: dict[str, Any] = {}
    for file in order:
        names |= {key: value for key, value in files.get(file, {}).items() if value is not None}
    added = {
        token["content"]: {"id": int(id_), **token} for id_, token in names.get("added_tokens_decoder", {}).items()
    }
    if legacy and (folder / "added_tokens.json").exists():
        older = read_json(folder / "added_tokens.json")
        added = {text: {"id": id_} for text, id_ in older.items()} | added
    roles = ("bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "add_bos_token")
    found = {key: names[key] for key in (*roles, "tokenizer_class", "legacy", "add_prefix_space") if key in names}
    extra = names.get("extra_special_tokens")
    tokens = {key: value for key, value in names.items() if key.endswith("_token")} | (
        extra if isinstance(extra, dict) else {}
    )
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    special = (tokens.get(f"{role}_token") for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
    return found | {
        "added_tokens": added,
        "special_tokens": [text for text in special if isinstance(text, str)],
        "templates": _templates(folder, names.get("chat_template")),
        "named_tokens": {key: text for key, text in tokens.items() if isinstance(text, str)},
    }


def _templates(folder: Path, listed: Any) -> dict[str, tuple[str, Path]]:
    """The text of chat templates by name, and the file each is in. listed: "chat_template" of tokenizer_config.json."""
    where = folder / "tokenizer_config.json"
    if isinstance(listed, dict):
        listed = [{"name": name, "template": template} for name, template in listed.items()]
    elif not isinstance(listed, list):
        listed = [] if listed is None else [{"name": "default", "template": listed}]
    found = {}
    for entry in listed:
        name, template = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "template"))
        if not isinstance(name, str) or not isinstance(template, str):
            raise UserError(f'{where}: "chat_template" must be text, or a list of {{"name": ..., "template": ...}}')
        found[name] = (template, where)
    files = {name: folder / file for name, file in TEMPLATES.items() if (folder / file).exists()}
    try:
        return {name: (read_bytes(file).decode(), file) for name, file in files.items()} or found
    except UnicodeDecodeError as error:
        raise UserError(f"{folder}: a chat template is not UTF-8 ({error}): save it as such") from None


def space(names: dict[str, Any], data: dict[str, Any], folder: Path) -> Space:
    """Where transformers puts a space before text, by tokenizer_config.json and the content of tokenizer.json, if any.

    Without tokenizer.json transformers puts none, and we do as sentencepiece does. Raises UserError for a tokenizer_class
    that has rules of its own.
    """
    kind = names.get("tokenizer_class")
    if kind not in LLAMA + CODE_LLAMA + NO_RULES:
        raise UserError(
            f"{folder}/tokenizer_config.json: the tokenizer_class {kind!r} with a sentencepiece tokenizer.model is not "
            "supported, as it may have rules of its own; where it only does what tokenizer.json says, write "
            '"PreTrainedTokenizerFast" there'
        )
    if kind not in NO_RULES:  # the settings decide before the json
        if names.get("add_prefix_space") is False:
            return "never"
        if not names.get("legacy") or kind in CODE_LLAMA:
            return "first"
        # "legacy" is how Llama 2 was trained: with the ids of its tokenizer.json and of sentencepiece, which transformers 4
        # gives. transformers 5 has other ids where a stretch begins with a space.
    steps = [data.get("pre_tokenizer") or {}, data.get("normalizer") or {}]
    steps += [step for outer in steps for step in outer.get("pretokenizers", outer.get("normalizers", []))]
    kinds = {step.get("type"): step for step in steps}
    if "Metaspace" in kinds:
        found = kinds["Metaspace"].get("prepend_scheme")
        return found if found in ("always", "first", "never") else "always"
    return "never" if "Replace" in kinds and "Prepend" not in kinds else "each"


def begins_with_special(post_processor: dict[str, Any]) -> bool:
    """Whether a tokenizer.json puts a special token before each text."""
    steps = post_processor.get("processors", [post_processor])
    return any("SpecialToken" in step["single"][0] for step in steps if step.get("type") == "TemplateProcessing")
