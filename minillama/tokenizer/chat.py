"""Conversations as one text, by the checkpoint's own template, and which parts of the text are trained on.

A template does not say where in its text a turn is (except with {% generation %}), and searching for the content fails:
templates strip it, drop thoughts, put tool calls after it. So turns are found by the template's own loop over the
messages, and the text around the words of a turn by rendering the conversation with other words in that turn.
"""

import json
import re
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from minillama.errors import UserError

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]
Span = tuple[int, int]
"""Start and end, in characters"""

LLAMA3_TEMPLATE = r"""
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant', 'tool', 'ipython') -%}
{{- raise_exception('unknown role ' ~ message.role) -}}
{%- endif -%}
{{- bos_token if loop.first -}}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' ~ message.content.strip() ~ '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt -}}
"""

LLAMA2_TEMPLATE = r"""
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- bos_token ~ '[INST] ' -}}
{{- '<<SYS>>\n' ~ messages[0].content.strip() ~ '\n<</SYS>>\n\n' if loop.index == 2 and messages[0].role == 'system' -}}
{{- message.content.strip() ~ ' [/INST]' -}}
{%- elif message.role == 'assistant' -%}
{{- ' ' ~ message.content.strip() ~ ' ' ~ eos_token -}}
{%- elif message.role != 'system' -%}
{{- raise_exception('unknown role ' ~ message.role) -}}
{%- elif not loop.first or (messages|length > 1 and messages[1].role != 'user') -%}
{{- raise_exception('a system message must come first and a user message after it') -}}
{%- endif -%}
{%- endfor -%}
"""

LLAMA3_HEADER_END = "<|end_header_id|>\n\n"


REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's thoughts: templates use the first, data also the others"""
DEEPEST = 100


@dataclass(frozen=True)
class ChatTemplate:
    source: str
    where: Path
    """The file that it is in"""
    variables: dict[str, str]
    """bos_token and so on"""
    day: date
    """The date that strftime_now shows, at midnight"""

    def render(self, messages: Messages, tools: Tools | None, *, prompt: bool = False, marked: bool = False) -> str:
        """The text of a conversation that `prepared` has returned. prompt: with the beginning of the next answer.

        marked: with the marks of template.py for messages[i], by i. Raises UserError for any error of the template.
        """
        from minillama.tokenizer import template  # jinja2 is imported when it is needed

        values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        return template.render(
            self.source,
            self.variables | values,
            now=datetime.combine(self.day, time()),
            where=self.where,
            marked={id(message): number for number, message in enumerate(messages)} if marked else None,
        )

    @cached_property
    def marks_generation(self) -> bool:
        from minillama.tokenizer import template

        return template.has_generation(self.source, self.where)

    @property
    def shows_day(self) -> bool:
        return "strftime_now" in self.source


def prepared(messages: Messages, tools: Tools | None) -> tuple[Messages, Tools | None]:
    """Copies as templates expect them: messages without keys whose value is None, thoughts under the names they have in
    templates, and no half of a surrogate pair. Raises UserError for what is no list of {"role": str, "content": str}; a
    message with "tool_calls" may have no content."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list with at least one message")
    result = []
    for n, message in enumerate(messages):
        fields = (
            {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
        )
        for key in ("role", "content"):
            if not isinstance(fields.get(key), str) and not (
                key == "content" not in fields and fields.get("tool_calls")
            ):
                raise UserError(f"message {n} needs a {key!r} that is a string, it is {message!r:.200}")
        thoughts = next((fields[key] for key in REASONING if key in fields), None)
        if thoughts is not None:
            fields = {"thinking": thoughts, **fields, "reasoning_content": thoughts}
        result.append(without_surrogates(fields))
    return result, without_surrogates(tools)


def without_surrogates(value: Any, depth: int = 0) -> Any:
    """JSON can hold surrogates. In every text a pair becomes its character, half a pair U+FFFD.

    Raises UserError for values nested more than DEEPEST times.
    """
    if depth > DEEPEST:
        raise UserError(f"messages and tools must not be nested more than {DEEPEST} times: correct or drop the row")
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [without_surrogates(item, depth + 1) for item in value]
    if not isinstance(value, str):
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def trained_spans(
    template: ChatTemplate, messages: Messages, tools: Tools | None, special: re.Pattern[str], first: int = 0
) -> tuple[str, list[Span]]:
    """The text of a conversation that `prepared` has returned, and the spans that are trained, from message `first` on.

    They are those of {% generation %} if the template has it. Else a turn of the assistant begins where the prompt for it
    ends, and ends with its end token, or if there is none, with its text. special: finds special and added tokens.
    Raises UserError if a turn cannot be told from the rest.
    """
    said = _Conversation(template, messages, tools)
    if template.marks_generation:
        return said.text, _generation_spans(said, first)
    turns = said.turns()
    surroundings = _surroundings(said, turns)
    mixed = _with_results(said, turns)
    spans = []
    for n, turn in turns.items():
        before, after = surroundings.get(n, (None, None)) or ("", "")
        if n < first or surroundings.get(n, "") is None:
            continue
        start = end = None
        if turn is not None and n not in mixed and (before is not None or "tool_calls" in messages[n]):
            start = _start(said, n, turn, before)
            end = None if start is None else _end(said.text, (start, turn[1]), after, special)
        if start is None or end is None:
            raise UserError(
                f"{template.where}: cannot tell which part of the text that the chat template makes is message {n}: mark "
                "what the assistant says in the template with {% generation %} and {% endgeneration %}, or drop the row"
            )
        if said.text.endswith(LLAMA3_HEADER_END, 0, start):
            start -= len("\n\n")  # llama-recipes trains on the line break after Llama 3's assistant header
        spans.append((start, end))
    return said.text, spans


@dataclass(frozen=True)
class _Conversation:
    template: ChatTemplate
    messages: Messages
    tools: Tools | None

    @cached_property
    def text(self) -> str:
        return "".join(self._parts[::2])

    @cached_property
    def marks(self) -> list[tuple[int, str]]:
        """The position of each mark of template.py in the text, and its content."""
        ends = accumulate(map(len, self._parts[::2]))
        return list(zip(ends, self._parts[1::2], strict=False))

    @cached_property
    def _parts(self) -> list[str]:
        """Text and marks alternately; only the text if the conversation holds a mark's own characters"""
        from minillama.tokenizer.template import CLOSE, OPEN

        marked = self.template.render(self.messages, self.tools, marked=True)
        given = json.dumps([self.template.source, self.messages, self.tools], ensure_ascii=False, default=str)
        if OPEN in given or CLOSE in given:
            return [self.template.render(self.messages, self.tools)]
        return re.split(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}", marked)

    def upto(self, count: int, *, prompt: bool = False) -> str | None:
        """The text of the first messages and of the prompt for an answer to them. None: the template refuses them."""
        try:
            return self.template.render(self.messages[:count], self.tools, prompt=prompt)
        except UserError:
            return None

    def turns(self) -> dict[int, Span | None]:
        """The span of each of the assistant's messages in the text; the last message has all that follows.

        It is what the template's loop over the messages writes for it. Without such a loop, it is what the message adds to
        the text of those before it, if that text stays the same. None: it cannot be told.
        """
        found: dict[int, Span | None] = {}
        for n, message in enumerate(self.messages):
            if message["role"] == "assistant":
                looped = self._turns_of_loops.get(n, [])
                shown = [turn for turn in looped if self.text[slice(*turn)].strip()]  # some loops only look at messages
                found[n] = shown[0] if len(shown) == 1 else self._added(n)
                if looped and not shown and found[n] is None:
                    found[n] = (looped[-1][0],) * 2
        last = len(self.messages) - 1
        if turn := found.get(last):
            found[last] = (turn[0], len(self.text))
        return found

    @cached_property
    def _turns_of_loops(self) -> dict[int, list[Span]]:
        turns: dict[int, list[Span]] = {}
        for number, (start, mark) in enumerate(self.marks):
            loop, _, message = mark.partition(":")
            if message:
                end = next(at for at, other in self.marks[number + 1 :] if other.partition(":")[0] == loop)
                turns.setdefault(int(message), []).append((start, end))
        return turns

    def _added(self, n: int) -> Span | None:
        before, after = self.upto(n) if n else "", self.upto(n + 1)
        if before is None or after is None or not (self.text.startswith(before) and self.text.startswith(after)):
            return None
        return len(before), len(after)


def _surroundings(said: _Conversation, turns: dict[int, Span | None]) -> dict[int, tuple[str, str] | None]:
    """The text before and after the words in a turn of the assistant that has only plain words.

    None: the template leaves the words out. What cannot be told is not in the result.
    """
    stem = "7190318"  # digits: upper and lower do not change them
    while stem in said.text:
        stem += "7"
    words = {n: f"{stem}{n:06}" for n, message in enumerate(said.messages) if message["role"] == "assistant"}
    plain = [{"role": "assistant", "content": words[n]} if n in words else m for n, m in enumerate(said.messages)]
    with_calls = [m if "tool_calls" in m else p for m, p in zip(said.messages, plain, strict=True)]
    for messages in (plain, with_calls):  # some templates want a tool's answer to follow a call
        try:
            other = _Conversation(said.template, messages, said.tools)
            other.text  # noqa: B018
            break
        except UserError:
            continue
    else:
        return {}
    found: dict[int, tuple[str, str] | None] = {}
    for n, turn in other.turns().items():
        if turn is None:
            continue
        shown, real = other.text[slice(*turn)], turns[n]
        if other.text.count(words[n]) == shown.count(words[n]) == 1:
            before, _, after = shown.partition(words[n])
            found[n] = before, after
        elif words[n] not in other.text and messages[n] is plain[n] and real and said.text[slice(*real)] == shown:
            found[n] = None
    return found


def _with_results(said: _Conversation, turns: dict[int, Span | None]) -> set[int]:
    """The assistant's messages whose turns show the tools' answers, so that not all of a turn is trained.

    Found by rendering with other answers of the tools, which changes the text of such a turn.
    """
    others = [m if m["role"] in ("system", "user", "assistant") else m | {"content": "7190318"} for m in said.messages]
    if others == said.messages:
        return set()
    try:
        other = _Conversation(said.template, others, said.tools)
        there = other.turns()
    except UserError:  # say it wants JSON of them
        return set()
    pairs = [(n, turn, there[n]) for n, turn in turns.items()]
    return {n for n, a, b in pairs if a and b and said.text[slice(*a)] != other.text[slice(*b)]}


def _start(said: _Conversation, n: int, turn: Span, before: str | None) -> int | None:
    """Where the trained text begins in the turn of message n: after the prompt of the model.

    before: the text before plain words. None: it cannot be told.
    """
    prompt = said.upto(max(n, 1), prompt=True)  # a template may have no prompt before the first message
    if prompt is not None and n > 0 and said.text.startswith(prompt) and turn[0] <= len(prompt) <= turn[1]:
        return len(prompt)
    # The template now renders the earlier messages differently, or the prompt goes on after the header, e.g. "<think>".
    context = said.upto(max(n, 1))
    if prompt is not None and context is not None and prompt.startswith(context):
        header = prompt.removeprefix(context)
        if header and said.text.startswith(header, *turn):
            return turn[0] + len(header)
    return turn[0] + len(before) if before is not None and said.text.startswith(before, *turn) else None


def _end(text: str, said: Span, after: str | None, special: re.Pattern[str]) -> int | None:
    """Where the trained text ends: with the token that ends the turn, without the white space that templates put after it.

    said: from where it begins to the end of the turn. after: the text after plain words.
    """
    start, stop = said
    if after is not None and text.endswith(after, start, stop):
        ended = special.search(after)
        return stop - len(after) + (ended.end() if ended else len(after))
    *_, last = [None, *special.finditer(text, start, stop)]  # a tool call may end with another token
    return last.end() if last and not text[last.end() : stop].strip() else None


def _generation_spans(said: _Conversation, first: int) -> list[Span]:
    spans, begun = [], []
    before = said.upto(first) if first else ""
    for at, mark in said.marks:
        if mark == "g":
            begun.append(at)
        elif mark == "/g":
            spans.append((begun.pop(), at))
    if (
        before is None
        or not said.text.startswith(before)
        or not said.marks
        or said.text != said.upto(len(said.messages))
    ):
        raise UserError(
            f"{said.template.where}: cannot tell what the {{% generation %}} blocks of the chat template show: drop the row"
        )
    return [span for span in spans if span[0] >= len(before)]
