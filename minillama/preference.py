"""A row of preference data -> its two conversations: one prompt, with the answer that was chosen and the one rejected."""

from typing import Any

from minillama.chat import REASONING
from minillama.datasets import Encoded, _checked, _field, _from_sharegpt, _list, _text, tools_of
from minillama.errors import UserError

FIELDS = ("prompt", "chosen", "rejected", "conversations", "system", "tools")


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
