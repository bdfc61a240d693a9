"""The two ways from text to token ids: byte-pair encoding by tiktoken, and sentencepiece."""

import re
import unicodedata
from collections.abc import Iterator

from minillama.errors import UserError
from minillama.tokenizer.files import Space

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit alone, then GPT-2's pattern on the text between digits. There, white space before a digit ends its piece,
# so it stays whole (possessive: no backtracking through a long run that has no digit behind it).
DIGITS_GPT2_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s++(?=\p{N})|\s+(?!\S)|\s+"

# tiktoken's regex engine keeps one stack entry for each character of white space and gives up at a million.

# tiktoken's regex engine keeps one stack entry for each character of white space and gives up at a million.
LONGEST_SPACE = 100_000
SECONDS, SECONDS_A_CHARACTER = 5.0, 1e-5
"""Time limit of the slower engine, for vocabularies that lack bytes"""


class BytePair:
    """tiktoken, with ids that need not be in the order of the merges and bytes that the vocabulary may lack."""

    def __init__(self, tokens: list[bytes], ids: list[int] | None, pattern: str, nfc: bool = False) -> None:
        import tiktoken

        self._nfc = nfc
        self._pattern = pattern
        self._ids = None if ids is None or ids == list(range(len(tokens))) else ids
        self.bytes_of = dict(zip(range(len(tokens)) if ids is None else ids, tokens, strict=True))
        self.highest_id = max(self.bytes_of)
        present = set(tokens)
        self._missing = bytes(byte for byte in range(256) if bytes([byte]) not in present)
        self._first_missing = len(tokens)
        ranks = {token: rank for rank, token in enumerate([*tokens, *(bytes([byte]) for byte in self._missing)])}
        self._encoding = tiktoken.Encoding("minillama", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str, first: bool = True) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self._nfc else text
        ranks: list[int] = []
        for part in _cut_long_space(text):
            found = self._encoding.encode_ordinary(part)
            if self._missing and max(found, default=0) >= self._first_missing:
                found = self._encode_without_missing(part)
            ranks += found
        return ranks if self._ids is None else [self._ids[rank] for rank in ranks]

    def _encode_without_missing(self, text: str) -> list[int]:
        """Like `tokenizers`: bytes that are not in the vocabulary (SmolLM2 lacks 21) are dropped before merging."""
        import regex  # comes with tiktoken

        seconds = SECONDS + SECONDS_A_CHARACTER * len(text)  # it may try exponentially many ways, unlike tiktoken
        try:
            matches = list(regex.finditer(self._pattern, text, timeout=seconds))
        except TimeoutError:
            raise UserError(
                f"the expression of the pre-tokenizer in tokenizer.json takes more than {seconds:.2g} seconds for this "
                f"text: change {self._pattern!r:.80}"
            ) from None
        pieces = (match.group().encode().translate(None, self._missing) for match in matches)
        return [rank for piece in pieces if piece for rank in self._encoding._encode_single_piece(piece)]

    def size(self, text: str, first: bool) -> int:
        """In bytes, of which each token has some: see `sizes`"""
        text = unicodedata.normalize("NFC", text) if self._nfc else text
        return len(text.encode().translate(None, self._missing))

    def sizes(self, ids: list[int]) -> list[int]:
        return [len(self.bytes_of[id_]) for id_ in ids]

    def decode(self, ids: list[int], first: bool = True) -> str:
        return b"".join(self.bytes_of.get(id_, b"\xff") for id_ in ids).decode(errors="replace")

    def id_of(self, token: str) -> int | None:
        byte_of = byte_alphabet()  # in which the vocabulary is written
        content = bytes(byte_of[char] for char in token) if set(token) <= byte_of.keys() else token.encode()
        return next((id_ for id_, one in self.bytes_of.items() if one == content), None)


class SentencePiece:
    """Every part between special tokens is encoded on its own, with a space before it as `space` says.

    each: before every part, as the model does. always, first, never: as transformers' Metaspace, before every part, only
    at the beginning of the text, or nowhere, and never where there is a space already.
    """

    def __init__(self, content: bytes, space: Space) -> None:
        from sentencepiece import SentencePieceProcessor

        self._space = space
        if space != "each":
            # A protobuf's field is what comes last: normalizer_spec with add_dummy_prefix, remove_extra_whitespaces = false
            content += b"\x1a\x04\x18\x00\x20\x00"
        self._model = SentencePieceProcessor(model_proto=content)
        self.highest_id = self._model.get_piece_size() - 1

    def _spaced(self, text: str, first: bool) -> str:
        spaced = self._space == "always" or (self._space == "first" and first)
        return f" {text}" if spaced and not text.startswith((" ", "▁")) else text

    def encode(self, text: str, first: bool = True) -> list[int]:
        return self._model.encode(self._spaced(text, first))

    def size(self, text: str, first: bool) -> int:
        return len(self._model.normalize(self._spaced(text, first)).encode())

    def sizes(self, ids: list[int]) -> list[int]:
        return [1 if self._model.is_byte(id_) else len(self._model.id_to_piece(id_).encode()) for id_ in ids]

    def decode(self, ids: list[int], first: bool = True) -> str:
        text = self._model.decode(ids)  # each: without the model's space
        return text.removeprefix(" ") if self._space == "always" or (self._space == "first" and first) else text

    def id_of(self, token: str) -> int | None:
        id_ = self._model.piece_to_id(token)
        return None if id_ == self._model.unk_id() else id_


def _cut_long_space(text: str) -> Iterator[str]:
    start = 0
    if len(text) > LONGEST_SPACE:
        for match in re.finditer(rf"\s{{{LONGEST_SPACE}}}", text):
            yield text[start : match.end()]
            start = match.end()
    yield text[start:]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, as used in tokenizer.json: itself if printable, else U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(other)}
