"""From a row of a data set to tokens and loss mask.

A format is one function from a row (a dict) to the row's token ids and, for each id, whether it is trained.
The prompts are llama-recipes' letter for letter, so that weights and losses compare with runs made there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np

from minillama.data.documents import Documents
from minillama.data.rows import shown
from minillama.errors import UserError
from minillama.files import DEPTH, is_deep
from minillama.model.loss import IGNORE
from minillama.tokenizer.chat import REASONING

LONGEST_PART = 2**20
"""Characters of a text that are tokenized at once"""


class Encoded(NamedTuple):
    ids: Sequence[int] | np.ndarray
    trained: Sequence[bool] | np.ndarray
    had_ends: bool = False
    """The text began with BOS, or ended with EOS"""


# --- formats: one row -> ids and mask. `encode_rows` adds the place to their errors.


def encode_samsum(row: dict[str, Any], tokenizer: Any) -> Encoded:
    prompt = f"Summarize this dialog:\n{_text(row, 'dialogue')}\n---\nSummary:\n"
    return _prompt_answer(prompt, _answer(row, "summary"), tokenizer)


def encode_alpaca(row: dict[str, Any], tokenizer: Any) -> Encoded:
    has_input = row.get("input") not in (None, "")
    prompt = "Below is an instruction that describes a task"
    if has_input:
        prompt += ", paired with an input that provides further context"
    prompt += ". Write a response that appropriately completes the request.\n\n"
    prompt += f"### Instruction:\n{_text(row, 'instruction')}\n\n"
    if has_input:
        prompt += f"### Input:\n{_text(row, 'input')}\n\n"
    # llama-recipes tokenizes prompt and output together. There ":" can merge with the output's first word, and
    # the prompt alone, as in generation, has other ids than in training. Two calls keep them the same.
    # An output may be empty: some in the published set are, and llama-recipes trains their eos.
    return _prompt_answer(prompt + "### Response:", _text(row, "output"), tokenizer)


def encode_grammar(row: dict[str, Any], tokenizer: Any) -> Encoded:
    prompt = f"Correct this to standard English: {_text(row, 'input')}\n---\nCorrected: "
    return _prompt_answer(prompt, _answer(row, "target"), tokenizer)


def encode_chat(row: dict[str, Any], tokenizer: Any) -> Encoded:
    """OpenAI's messages, ShareGPT's conversations, or a prompt with a response."""
    if "conversations" in row and "messages" not in row:
        messages = [_from_sharegpt(number, turn) for number, turn in enumerate(_list(row, "conversations"), 1)]
    elif "prompt" in row and "messages" not in row:
        messages = [
            {"role": "user", "content": _text(row, "prompt")},
            {"role": "assistant", "content": _answer(row, "response")},
        ]
    else:
        messages = [_checked(number, message) for number, message in enumerate(_list(row, "messages"), 1)]
    if row.get("system") not in (None, "") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(row, "system")}, *messages]
    for number, message in enumerate(messages, 1):
        others = any(message.get(key) for key in ("tool_calls", *REASONING))
        if message["role"] == "assistant" and not others and not message["content"].strip():
            raise UserError(f"message {number}, the assistant's, is empty, so nothing to train on: drop the row")
    tools = tools_of(row)
    ids, mask = tokenizer.encode_chat(messages, tools) if tools else tokenizer.encode_chat(messages)
    if not any(mask):
        said = any(message["role"] == "assistant" for message in messages)
        why = "the chat template trains nothing of it" if said else "no message has the role 'assistant'"
        raise UserError(f"{why}, so nothing to train on: drop the row")
    return Encoded(ids, mask)


def encode_text(row: dict[str, Any], tokenizer: Any) -> Encoded:
    text = _answer(row, "text")
    # A list of Python integers takes ten times the memory of an array: a book is tokenized in parts, cut at line ends.
    parts: list[np.ndarray] = []
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + LONGEST_PART) + 1 if len(text) - start > LONGEST_PART else len(text)
        end = end or start + LONGEST_PART
        parts.append(np.array(_part(tokenizer, text[start:end], start > 0), np.int32))
        start = end
    begun = len(parts[0]) and parts[0][0] == tokenizer.bos_id
    ended = len(parts[-1]) and parts[-1][-1] == tokenizer.eos_id and sum(map(len, parts)) > begun
    if tokenizer.bos_id is not None and not begun:
        parts.insert(0, np.array([tokenizer.bos_id], np.int32))
    if not ended:
        parts.append(np.array([tokenizer.eos_id], np.int32))
    ids = np.concatenate(parts)
    return Encoded(ids, np.ones(len(ids), np.bool_), bool(begun or ended))


def _part(tokenizer: Any, text: str, goes_on: bool) -> list[int]:
    """Ids of a part of a text. A later part must not get the space that sentencepiece adds at the beginning of a text."""
    if not (goes_on and getattr(tokenizer, "puts_space", False)):
        return tokenizer.encode(text)
    line_end = tokenizer.encode("\n")
    ids = tokenizer.encode("\n" + text)
    return ids[len(line_end) :] if ids[: len(line_end)] == line_end else tokenizer.encode(text)


def encode_preference(row: dict[str, Any], tokenizer: Any) -> tuple[Encoded, Encoded]:
    """The chosen and the rejected conversation, of which only the answer is trained. Raises UserError for a row without
    two answers to one prompt.

    prompt, chosen and rejected are texts, messages or lists of messages, in OpenAI's form or ShareGPT's, whose prompt may
    be called conversations. Two whole conversations, chosen and rejected, have as prompt the messages they begin with.
    """
    prompt, *answers = _messages(row)
    if row.get("system") not in (None, "") and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": _text(row, "system")}, *prompt]
    if answers[0] == answers[1]:
        raise UserError("chosen and rejected are the same, so nothing is preferred: drop the row")
    tools, encoded = tools_of(row), []
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        _check_answer(name, answer)
        ids, mask = tokenizer.encode_chat([*prompt, *answer], tools, first=len(prompt))
        if not any(mask[1:]):
            raise UserError(f"the chat template shows nothing of the {name} answer: drop the row")
        encoded.append(Encoded(ids, mask))
    if encoded[0].ids == encoded[1].ids:
        raise UserError("chosen and rejected are the same in the chat template, so nothing is preferred: drop the row")
    return encoded[0], encoded[1]


def _messages(row: dict[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The messages of the prompt, of the chosen answer and of the rejected one."""
    chosen, rejected = (_conversation(row, name, "assistant") for name in ("chosen", "rejected"))
    given = "conversations" if "conversations" in row and "prompt" not in row else "prompt"
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return _conversation(row, given, "user"), chosen, rejected
    if isinstance(row.get(given), list):
        raise UserError(f"chosen and rejected begin with the prompt, and there is '{given}' too: leave one of them out")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise UserError("chosen and rejected do not begin with the same message, so there is no prompt: drop the row")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _conversation(row: dict[str, Any], name: str, role: str) -> list[Any]:
    """Messages of a field that is a list of them, one alone, or the text that `role` says."""
    match _field(row, name):
        case str() as text:
            return [{"role": role, "content": text}]
        case dict() as message:
            return [_message(1, message)]
    return [_message(number, message) for number, message in enumerate(_list(row, name), 1)]


def _message(number: int, message: Any) -> dict[str, Any]:
    """One in OpenAI's form, from that or from ShareGPT's."""
    return (_from_sharegpt if isinstance(message, dict) and "from" in message else _checked)(number, message)


def _check_answer(name: str, answer: list[Any]) -> None:
    if not answer:
        raise UserError(f"{name} is the prompt alone, without an answer of its own: drop the row")
    if answer[0]["role"] != "assistant":
        raise UserError(f"{name} differs from the other in what {answer[0]['role']} says: drop the row")
    for message in answer:
        others = any(message.get(key) for key in ("tool_calls", *REASONING))
        if message["role"] == "assistant" and not others and not message["content"].strip():
            raise UserError(f"the {name} answer is empty: drop the row")


def encode_own(row: dict[str, Any], tokenizer: Any) -> Encoded:
    """A row of the user's own function: ids and labels as for llama-recipes, or a row of the formats chat or text."""
    if "input_ids" not in row:
        return encode_text(row, tokenizer) if "text" in row else encode_chat(row, tokenizer)
    try:
        ids, labels = (np.asarray(_field(row, name)) for name in ("input_ids", "labels"))
    except ValueError as error:  # lists of different lengths
        raise UserError(f"input_ids and labels must be lists of integers ({error})") from None
    for name, values in (("input_ids", ids), ("labels", labels)):
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer) or not 0 < len(values) == len(ids):
            raise UserError(f"field '{name}' must be a list of integers, of one length with input_ids")
    trained = labels != IGNORE
    if not (ids.min() >= 0 and ids.max() < tokenizer.vocab_size and (ids == labels)[trained].all()):
        raise UserError(
            f"input_ids must be from 0 to {tokenizer.vocab_size - 1}, and each of the labels {IGNORE} or the id itself"
        )
    if not trained[1:].any():  # the first token is not predicted: there is nothing before it
        raise UserError(f"all labels but the first are {IGNORE}, so nothing to train on: give labels, or drop the row")
    return Encoded(ids, trained)


ENCODERS: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "samsum": encode_samsum,
    "alpaca": encode_alpaca,
    "grammar": encode_grammar,
    "chat": encode_chat,
    "text": encode_text,
    "preference": encode_preference,
}
FIELDS = {
    "samsum": ("dialogue", "summary"),
    "alpaca": ("instruction", "input", "output"),
    "grammar": ("input", "target"),
    "chat": ("messages", "conversations", "system", "prompt", "response", "tools"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected", "conversations", "system", "tools"),
}


def encode_rows(
    rows: Sequence[tuple[str, Callable[[], Any]]],
    dataset: str,
    columns: Mapping[str, str],
    tokenizer: Any,
    train_on: Literal["answers", "all"] = "answers",
    pairs: bool = False,
) -> tuple[Documents, list[str]]:
    """The documents of rows, as `read_rows` yields them, and for each row that cannot be used its place and why.

    pairs: rows of preference data, each of which becomes two documents.
    """
    encode = encode_preference if pairs else ENCODERS.get(dataset, encode_own)
    tokens: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    offsets, refused, had_ends = [0], [], 0
    for place, read in rows:
        try:
            row = read()
            if is_deep(row):
                raise UserError(f"more than {DEPTH} lists and objects inside each other: drop the row")
            if not isinstance(row, dict):
                raise UserError(f"a row must be an object, found {shown(row)}")
            encoded: Any = encode(_renamed(row, columns), tokenizer)
        except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, UTF-8 cannot
            refused.append(f"{place}: text that is not Unicode ({error}): correct or drop the row")
        except UserError as error:
            refused.append(f"{place}: {error}")
        else:
            for ids, mask, own_ends in encoded if pairs else [encoded]:
                tokens.append(np.asarray(ids, np.int32))
                trained.append(np.ones(len(ids), np.bool_) if train_on == "all" else np.asarray(mask, np.bool_))
                offsets.append(offsets[-1] + len(ids))
                had_ends += own_ends
    empty = np.empty(0, np.int32)
    return Documents(
        np.concatenate([empty, *tokens]),
        np.concatenate([empty.astype(np.bool_), *trained]),
        np.array(offsets),
        had_ends=had_ends,
        per_row=2 if pairs else 1,
    ), refused


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for name, column in columns.items():
        if column not in row:
            raise UserError(
                f"field '{column}', to be {name}, is missing, the fields are {', '.join(map(repr, row)) or 'none'}: "
                "correct --data.columns or the row"
            )
    return {**row, **{name: row[column] for name, column in columns.items()}} if columns else row


def _from_sharegpt(number: int, turn: Any) -> dict[str, str]:
    """{"from": "human", "value": "Hi"} -> {"role": "user", "content": "Hi"}"""
    said = turn if isinstance(turn, dict) else {}
    sender = said.get("from")
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None or not isinstance(said.get("value"), str):
        raise UserError(
            f"turn {number} needs 'from', one of {', '.join(SHAREGPT_ROLES)}, and the text 'value', found {shown(turn)}"
        )
    return {"role": role, "content": said["value"]}


SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def _checked(number: int, message: Any) -> dict[str, Any]:
    fields = message if isinstance(message, dict) else {}
    calls = fields.get("tool_calls") and fields.get("content") is None  # with a call there may be no text
    if not isinstance(fields.get("role"), str) or not (isinstance(fields.get("content"), str) or calls):
        raise UserError(f"message {number} needs the texts 'role' and 'content', found {shown(message)}")
    return {"content": None, **message}


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The functions that a conversation may call, as JSON schemas; from Parquet or Arrow they come as text."""
    tools = row.get("tools")
    with suppress(ValueError, RecursionError):
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"field 'tools' must be a list of JSON schemas, or that as JSON, found {shown(tools)}")
    return tools or None


def _prompt_answer(prompt: str, answer: str, tokenizer: Any) -> Encoded:
    before = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)  # some checkpoints have no BOS
    after = tokenizer.encode(answer, eos=True)
    ended = after[-2:] == [tokenizer.eos_id] * 2
    after = after[:-1] if ended else after
    return Encoded(before + after, [False] * len(before) + [True] * len(after), ended)


def _field(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise UserError(
            f"field '{name}' is missing, the fields are {', '.join(map(repr, row)) or 'none'}: "
            f"name the right one with --data.columns {name}=COLUMN, or choose the --data.dataset that has these"
        )
    return row[name]


def _text(row: dict[str, Any], name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise UserError(f"field '{name}' must be text, found {shown(value)}: correct or drop the row")
    return value


def _answer(row: dict[str, Any], name: str) -> str:
    value = _text(row, name)
    if not value or value.isspace():
        raise UserError(f"field '{name}' is empty ({shown(value)}), so nothing to train on: drop the row")
    return value


def _list(row: dict[str, Any], name: str) -> list[Any]:
    value = _field(row, name)
    if not isinstance(value, list) or not value:
        raise UserError(f"field '{name}' must be a list of messages, found {shown(value)}")
    return value
