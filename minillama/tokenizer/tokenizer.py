"""Text to ids and back, from a checkpoint's tokenizer files.

Two engines: tiktoken for byte-level BPE (Llama 3 and later, as Meta's `tokenizer.model` or as `tokenizer.json`) and
sentencepiece (Llama 2). Which one is decided by what is in the files, never by what a folder is called.
"""

import base64
import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

from minillama.errors import UserError, disk_text
from minillama.files import read_bytes, read_json
from minillama.tokenizer.chat import (
    LLAMA2_TEMPLATE,
    LLAMA3_TEMPLATE,
    ChatTemplate,
    Messages,
    Tools,
    prepared,
    trained_spans,
    without_surrogates,
)
from minillama.tokenizer.engines import BytePair, SentencePiece, byte_alphabet
from minillama.tokenizer.export import is_tiktoken
from minillama.tokenizer.files import FILES, NAMES, TEMPLATES, begins_with_special, read_names, space

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit alone, then GPT-2's pattern on the text between digits. There, white space before a digit ends its piece,
# so it stays whole (possessive: no backtracking through a long run that has no digit behind it).
DIGITS_GPT2_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s++(?=\p{N})|\s+(?!\S)|\s+"


class Tokenizer:
    """What `load_tokenizer` returns. All ids are plain ints.

    `bos_id` is None if the checkpoint has no BOS. `adds_bos`: whether a text begins with it by default, as in
    transformers. `pad_id` is `eos_id` if no padding token is named. `vocab_size` is the highest id + 1, which may be less
    than the rows of the model's embedding. `path` is where it was loaded from. `fingerprint` is a hash of the files'
    content, and of the date if their chat template shows it.
    """

    path: Path
    fingerprint: str

    def __init__(
        self, engine: Any, special: dict[str, dict[str, Any]], names: dict[str, Any], where: Path, day: date
    ) -> None:
        self._engine = engine
        self._where = where
        for text in names.get("special_tokens", ()):  # also those that are ordinary entries of the vocabulary
            if text not in special and (id_ := engine.id_of(text)) is not None:
                special[text] = {"id": id_}
        if wrong := [
            text for text, token in special.items() if not (text and type(token["id"]) is int and token["id"] >= 0)
        ]:
            raise UserError(
                f"{where}: the added token {wrong[0]!r} has the id {special[wrong[0]]['id']!r}; correct the files"
            )
        self._special = {text: token["id"] for text, token in special.items()}
        self._special_text = {id_: text for text, id_ in self._special.items()}
        self._hidden = {token["id"] for token in special.values() if token.get("special", True)}
        self._special_re = _special_regex(special)
        self._takes_space = {text for text, token in special.items() if token.get("lstrip")}
        self.vocab_size: int = max([engine.highest_id, *self._special.values()]) + 1
        self.bos_id: int | None = self._named_id(names.get("bos_token"), names.get("bos_token_id"))
        self.adds_bos: bool = self.bos_id is not None and names.get("add_bos_token", True)
        eos_id = self._named_id(names.get("eos_token"), names.get("eos_token_id"))
        if eos_id is None:
            raise UserError(f"{where}: no end-of-text token; name it as eos_token in tokenizer_config.json beside it")
        self.eos_id: int = eos_id
        pad_id = self._named_id(names.get("pad_token"), None)
        self.pad_id: int = eos_id if pad_id is None else pad_id
        sources: dict[str, tuple[str, Path]] = names["templates"]
        self.lent_format: str | None = None
        """Whose chat format it takes for want of a template of its own: "Llama 3's", "Llama 2's" """
        if not sources and {"<|start_header_id|>", "<|eot_id|>"} <= self._special.keys():
            self.lent_format, sources = "Llama 3's", {"default": (LLAMA3_TEMPLATE, where)}
        elif not sources and isinstance(engine, SentencePiece):
            self.lent_format, sources = "Llama 2's", {"default": (LLAMA2_TEMPLATE, where)}
        named = names["named_tokens"] | {"eos_token": self._text_of(eos_id)}
        if self.bos_id is not None:
            named["bos_token"] = self._text_of(self.bos_id)
        self._templates = {name: ChatTemplate(*source, named, day) for name, source in sources.items()}

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`. Special and added tokens that are spelled out in it become their id, as in transformers.

        Raises UserError for `bos=True` if there is no BOS.
        """
        ids: list[int] = []
        if bos:
            if self.bos_id is None:
                raise UserError(f"{self._where}: this tokenizer has no BOS token; encode with bos=False")
            ids.append(self.bos_id)
        for _, _, segment in self._segments(without_surrogates(text)):
            ids += segment
        return [*ids, self.eos_id] if eos else ids

    def decode(self, ids: list[int], *, special: bool = True) -> str:
        """Text of `ids`. Special tokens appear as their text, or are left out; invalid UTF-8 and unknown ids as U+FFFD."""
        out: list[str] = []
        run: list[int] = []
        for id_ in ids if special else [id_ for id_ in ids if id_ not in self._hidden]:
            known = 0 <= id_ <= self._engine.highest_id
            if id_ in self._special_text or not known:
                out += [self._engine.decode(run, not out), self._special_text.get(id_, "\ufffd")]
                run = []
            else:
                run.append(id_)
        return "".join([*out, self._engine.decode(run, not out)])

    def id_of(self, token: str) -> int | None:
        """Id of a special or added token by its text, None if there is no such token."""
        return self._special.get(token)

    def encode_chat(
        self, messages: Messages, tools: Tools | None = None, *, first: int = 0
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation in the checkpoint's chat format, and for each id whether it is trained on.

        `messages` are `{"role": str, "content": str}`, and what else the template knows, such as "tool_calls"; `tools`
        are JSON schemas. Trained are the assistant's turns with the token that ends each, and with the line break after
        the header in Llama 3's format (as llama-recipes did); or what the template marks with {% generation %}, as
        transformers' assistant_masks. `first`: only of the messages from this number on. Raises UserError for bad
        messages, a template that refuses them, or if it cannot be told which part is the assistant's.
        """
        text, spans = trained_spans(self._template(tools), *prepared(messages, tools), self._special_re, first)
        ids: list[int] = []
        mask: list[bool] = []
        for start, end, segment in self._segments(text):
            trained = [False] * len(segment)
            for a, b in spans:
                if a < end and b > start:
                    first, last = self._tokens_of(text[start:end], a - start, b - start, segment, start == 0)
                    trained[first:last] = [True] * (last - first)
            ids += segment
            mask += trained
        return ids, mask

    def chat_prompt(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """Ids of a conversation up to where the assistant's next answer begins. Raises like `encode_chat`."""
        return self.encode(self.chat_text(messages, tools))

    def chat_text(self, messages: Messages, tools: Tools | None = None) -> str:
        """The text whose ids `chat_prompt` returns."""
        return self._template(tools).render(*prepared(messages, tools), prompt=True)

    @property
    def puts_space(self) -> bool:
        """Whether a text may get a space in front, as by sentencepiece."""
        return isinstance(self._engine, SentencePiece)

    @property
    def shows_day(self) -> bool:
        """Whether ids of conversations depend on the date that `load_tokenizer` was given."""
        return any(template.shows_day for template in self._templates.values())

    def _template(self, tools: Tools | None) -> ChatTemplate:
        found = self._templates.get("tool_use") if tools is not None else None
        if (found := found or self._templates.get("default")) is None:
            raise UserError(
                f"{self._where}: the tokenizer files carry no chat template; put the instruct checkpoint's "
                "chat_template.jinja beside them"
            )
        return found

    def _segments(self, text: str) -> Iterator[tuple[int, int, list[int]]]:
        """(start, end, ids): the special tokens in `text` and the parts between them; offsets in characters."""
        start = 0
        for match in self._special_re.finditer(text):
            begin, name = match.start(), match.group()
            name = name if name in self._special else name.rstrip()  # white space after it (rstrip)
            while name in self._takes_space and begin > start and text[begin - 1].isspace():
                begin -= 1  # before it (lstrip); a regular expression would search from every space on
            if begin > start:
                yield start, begin, self._engine.encode(text[start:begin], start == 0)
            yield begin, match.end(), [self._special[name]]
            start = match.end()
        if start < len(text):
            yield start, len(text), self._engine.encode(text[start:], start == 0)

    def _tokens_of(self, text: str, start: int, end: int, ids: list[int], first: bool) -> tuple[int, int]:
        """The range of `ids`, the tokens of a segment, that overlap the characters from start to end."""
        if start <= 0 and end >= len(text):
            return 0, len(ids)
        ends = list(accumulate(self._engine.sizes(ids)))
        if ends[-1] != self._engine.size(text, first):
            raise UserError(
                f"{self._where}: cannot tell which tokens are the assistant's, as the tokenizer changes the text: drop the "
                "row"
            )
        before = 0 if start <= 0 else bisect_right(ends, self._engine.size(text[:start], first))
        upto = len(ids) if end >= len(text) else bisect_left(ends, self._engine.size(text[:end], first)) + 1
        return before, upto

    def _named_id(self, token: Any, id_: Any) -> int | None:
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return id_[0] if isinstance(id_, list) else id_  # config.json may list several EOS
        if not isinstance(token, str):
            raise UserError(
                f"{self._where}: the special token {token!r} beside it is no text; correct tokenizer_config.json"
            )
        found = self._special.get(token)
        found = self._engine.id_of(token) if found is None else found
        if found is None:
            raise UserError(f"{self._where}: {token!r}, which tokenizer_config.json names, is not in the vocabulary")
        return found

    def _text_of(self, id_: int) -> str:
        return self._special_text[id_] if id_ in self._special_text else self._engine.decode([id_])


def load_tokenizer(path: str | Path, *, day: date | None = None) -> Tokenizer:
    """Reads the tokenizer of a checkpoint: its folder, or the tokenizer.json or tokenizer.model in it.

    day: the date for chat templates that ask for it; None: today. Raises UserError if there is none, or one that
    cannot give the same ids as in transformers (for Llama 2's "legacy" tokenizers: as tokenizer.json gives; for a
    tokenizer.model without one, whose prefix space transformers 5 drops: as sentencepiece gives).
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder; give a checkpoint's folder, tokenizer.json or tokenizer.model"
        )
    day = day or date.today()
    try:
        tokenizer = _read_tokenizer(path, day)
    except OSError as error:
        raise UserError(disk_text(error)) from None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as error:
        raise UserError(f"{path}: its tokenizer's files are damaged ({error!r:.200}); download them again") from None
    tokenizer.path = path
    digest = hashlib.blake2b(digest_size=16)
    for file in [path] if path.is_file() else []:
        digest.update(read_bytes(file))
    for name in FILES + NAMES + tuple(TEMPLATES.values()):
        file = (path if path.is_dir() else path.parent) / name
        content = read_bytes(file) if file.is_file() else None
        digest.update(b"" if content is None else f"{name} {len(content)}".encode() + content)
    digest.update(day.isoformat().encode() if tokenizer.shows_day else b"")
    tokenizer.fingerprint = digest.hexdigest()
    return tokenizer


def _read_tokenizer(path: Path, day: date) -> Tokenizer:
    folder = path if path.is_dir() else path.parent
    names = read_names(folder)
    json_file = folder / "tokenizer.json" if path.is_dir() or path.suffix != ".json" else path
    if (path.is_dir() or path == json_file) and json_file.exists():
        data = read_json(json_file)
        if "model" not in data:
            raise UserError(f"{json_file}: holds no tokenizer; give a checkpoint's folder or the tokenizer.json in it")
        names["add_bos_token"] = begins_with_special(data.get("post_processor") or {})
        if data.get("model", {}).get("type") == "BPE" and '"ByteLevel"' in json.dumps(data.get("pre_tokenizer")):
            try:
                return _from_json(json_file, data, names, day)
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{json_file}: damaged ({error!r}); download it again") from None
    candidates = [folder / "tokenizer.model", folder / "original" / "tokenizer.model"]  # the latter in Meta's HF repos
    if path.is_file() and path != json_file:
        candidates = [path]
    model = next((file for file in candidates if file.exists()), None)
    if model is None and json_file.exists():
        raise UserError(
            f"{json_file}: not byte-level BPE; put the checkpoint's sentencepiece tokenizer.model beside it"
        )
    if model is None:
        raise UserError(f"{folder}: no tokenizer.json or tokenizer.model; copy them from the original checkpoint")
    content = read_bytes(model)
    if is_tiktoken(content):
        return _from_tiktoken(model, content, names, day)
    return _from_sentencepiece(model, content, names, day)


def _from_tiktoken(path: Path, content: bytes, names: dict[str, Any], day: date) -> Tokenizer:
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        tokens = {int(rank): base64.b64decode(token, validate=True) for token, rank in pairs}
    except ValueError as error:
        raise UserError(f"{path}: not a tiktoken file ({error}); download it again") from None
    missing = {bytes([byte]) for byte in range(256)} - set(tokens.values())
    if sorted(tokens) != list(range(len(pairs))) or missing:
        raise UserError(f"{path}: incomplete, ranks or single bytes are missing; download it again")
    # The file holds no special tokens; these are Llama 3.1's names (3.0 only has other names for reserved ones).
    special = [f"<|{name}|>" for name in ("begin_of_text", "end_of_text", "reserved_special_token_0")]
    special += [f"<|{name}|>" for name in ("reserved_special_token_1", "finetune_right_pad_id")]
    special += [f"<|{name}|>" for name in ("reserved_special_token_2", "start_header_id", "end_header_id")]
    special += [f"<|{name}|>" for name in ("eom_id", "eot_id", "python_tag")]
    special += [f"<|reserved_special_token_{n}|>" for n in range(3, 3 + 256 - len(special))]
    added = {text: {"id": len(tokens) + n} for n, text in enumerate(special)}
    defaults = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[4]}
    engine = BytePair([tokens[rank] for rank in range(len(tokens))], None, LLAMA3_PATTERN)
    return Tokenizer(engine, added, defaults | names, path, day)


def _from_json(path: Path, data: dict[str, Any], names: dict[str, Any], day: date) -> Tokenizer:
    model, vocab = data["model"], data["model"]["vocab"]
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"{path}: BPE with {key} is not supported; remove it or use another tokenizer")
    normalizer = data.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise UserError(f"{path}: the normalizer {normalizer.get('type')} is not supported, only NFC")
    pattern = _pattern(path, data["pre_tokenizer"])

    added = {token["content"]: token for token in data.get("added_tokens", [])}
    byte_of = byte_alphabet()
    # tiktoken merges by the rank of the result, so ranks follow the order of the merges, not the ids.
    ranked = {char: vocab[char] for char in byte_of if char in vocab}
    previous = None
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        if token not in vocab:
            raise UserError(
                f"{path}: the merge {merge} makes a token that is not in the vocabulary; the file is damaged"
            )
        if token in ranked and token != previous:
            raise UserError(
                f"{path}: {token!r} is merged in two ways that differ in rank, which tiktoken cannot express"
            )
        ranked[token] = vocab[token]
        previous = token
    unmerged = {id_: token for token, id_ in vocab.items() if token not in ranked and token not in added}
    if model.get("ignore_merges") and unmerged:
        raise UserError(
            f"{path}: ignore_merges with tokens that no merge makes is not supported: {[*unmerged.values()][:5]}"
        )
    following = len(vocab)
    for text, token in added.items():  # `tokenizers` numbers these consecutively and ignores the file's ids
        if token["id"] != vocab.get(text, following):
            raise UserError(f"{path}: the added token {text!r} has the id {token['id']!r}, the next one is {following}")
        following = max(following, token["id"] + 1)
    added |= names["added_tokens"]
    tokens = [bytes(byte_of[char] for char in token) for token in ranked]
    try:
        engine = BytePair(tokens, list(ranked.values()), pattern, nfc=normalizer is not None)
    except ValueError as error:
        raise UserError(f"{path}: tiktoken does not take the pre-tokenizer's expression: {error}") from None
    engine.bytes_of.update((id_, token.encode()) for id_, token in unmerged.items())
    return Tokenizer(engine, added, names, path, day)


def _pattern(path: Path, pre_tokenizer: dict[str, Any]) -> str:
    """One regular expression that splits a text as the pre-tokenizers of a tokenizer.json do in sequence."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *first, last = steps
    kinds = [step["type"] for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise UserError(f"{path}: a pre-tokenizer with add_prefix_space is not supported")
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and first[0].get("individual_digits") and last.get("use_regex", True):
        return DIGITS_GPT2_PATTERN
    isolated = first and first[0].get("behavior") == "Isolated" and not first[0].get("invert")
    if kinds == ["Split", "ByteLevel"] and isolated and not last.get("use_regex", True):
        regex = first[0]["pattern"].get("Regex")
        if regex is not None and may_hang(regex):
            raise UserError(f"{path}: the pre-tokenizer's expression {regex!r:.80} may never end, and is not supported")
        pattern = regex if regex is not None else re.escape(first[0]["pattern"]["String"])
        # Text that the expression does not match is a piece too; tiktoken would drop it.
        return pattern if regex == LLAMA3_PATTERN else rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    raise UserError(f"{path}: the pre-tokenizer {' + '.join(kinds)} with these settings is not supported")


def may_hang(pattern: str) -> bool:
    """Whether tiktoken may backtrack exponentially: if the pattern has a back-reference, or repeats a group with a
    look-around. Also if the pattern cannot be parsed."""
    classes, groups = r"\[\^?\]?(?:\\.|[^\[\]\\])*\]", r"\((?:\?(?:<?[=!]|>|[imsu-]*[:)]|))?"
    looks = [False]  # for each open group, whether it has a look-around
    for part in re.findall(rf"\\.|{classes}|{groups}|\)[*+?{{]?|[\s\S]", pattern):
        if re.fullmatch(r"\\[1-9kg]|\[|\(\?", part):
            return True
        if part.startswith("(") and not part.endswith(")"):  # not flags alone
            looks.append(part[2:3] in tuple("<=!>"))
        elif part.startswith(")"):
            inside = looks.pop()
            if not looks or (inside and len(part) > 1):
                return True
            looks[-1] |= inside
    return len(looks) > 1


def _from_sentencepiece(path: Path, content: bytes, names: dict[str, Any], day: date) -> Tokenizer:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise UserError(f"{path}: neither a tiktoken nor a sentencepiece file; download it again") from None
    size = model.get_piece_size()
    pieces = [model.id_to_piece(n) for n in range(size)]  # all of them: it fails if one is not text
    special = {pieces[n]: {"id": n} for n in range(size) if model.is_control(n) or model.is_unknown(n)}
    json_file = path.with_name("tokenizer.json")
    data = read_json(json_file) if json_file.exists() else {}
    special |= {token["content"]: token for token in data.get("added_tokens", [])} | names["added_tokens"]
    own = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id()}
    own = {key: id_ for key, id_ in own.items() if id_ >= 0}
    return Tokenizer(SentencePiece(content, space(names, data, path.parent)), special, own | names, path, day)


def _special_regex(special: dict[str, dict[str, Any]]) -> re.Pattern[str]:
    """Finds special tokens: the first in the text, and the longest there; with white space after it, if it takes that."""
    alternatives = []
    for text in sorted(special, key=len, reverse=True):
        if special[text].get("single_word"):
            raise UserError(f"the added token {text!r} is marked single_word, which is not supported; remove the mark")
        alternatives.append(re.escape(text) + (r"\s*" if special[text].get("rstrip") else ""))
    return re.compile("|".join(alternatives) or r"(?!)")
