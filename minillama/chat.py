"""Conversations as one text: the checkpoint's own Jinja template, and which stretches of the text are trained on."""

import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from minillama.errors import UserError

Messages = list[dict[str, Any]]

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


def check_messages(messages: Messages) -> None:
    """Raises UserError unless `messages` is a non-empty list of {"role": str, "content": str}."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list with at least one message")
    for n, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise UserError(f"message {n} needs a {key!r} that is a string, it is {message!r:.200}")


def render(template: str, messages: Messages, bos: str, eos: str, add_generation_prompt: bool, where: Path) -> str:
    """The conversation as text. Raises UserError, named after `where`, with the template's message if it refuses."""
    from jinja2 import TemplateError

    try:
        return _compile(template).render(
            messages=messages,
            bos_token=bos,
            eos_token=eos,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
        )
    except (TemplateError, TypeError) as error:
        raise UserError(f"{where}: the chat template fails on this conversation: {error}") from error


def trained_spans(
    render: Callable[[Messages, bool], str], messages: Messages, special: re.Pattern[str], where: Path
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and for each assistant message (start, end) in characters of what the model must say.

    A turn starts where the generation prompt ends and ends with the first special token after the message's content.
    """
    text = render(messages, False)
    spans = []
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto = render(messages[: n + 1], False)
        if n == 0:
            # A template may put a default system message before the first message, but not before none.
            header = render(messages[:1], True).removeprefix(upto)
            before = upto.partition(header)[0] if header else ""
            prompt = before + header
        else:
            before, prompt = render(messages[:n], False), render(messages[:n], True)
        content = message["content"].strip()
        known = text.startswith(prompt)
        if not known:
            # Some generation prompts go on after the assistant's header, say with "<think>": keep what is shared.
            pairs = zip(prompt, text, strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            at = text.find(content, len(before)) if content else -1
            prompt = prompt[: min(shared, at) if at >= 0 else shared]
            known = text.startswith(before) and len(prompt) > len(before)
        if not known or not upto.startswith(prompt):
            raise UserError(
                f"{where}: cannot tell which part of the text message {n} is: the chat template renders what comes "
                "before it differently when the conversation goes on; split the conversation at this message"
            )
        start = len(prompt)
        at = upto.find(content, start)
        ended = special.search(upto, at + len(content) if at >= 0 else start)
        if text.startswith(upto):
            end = ended.end() if ended else len(upto)
        else:
            # Some templates drop an earlier turn's thoughts, or add a token after the last turn only.
            found = text.find(ended.group(), start) if ended else -1
            if ended is None or found < 0:
                raise UserError(f"{where}: cannot tell where message {n} ends in the text that the chat template makes")
            end = found + len(ended.group())
        if prompt.endswith(LLAMA3_HEADER_END):
            start -= len("\n\n")  # llama-recipes trains on the line break after Llama 3's assistant header
        spans.append((start, end))
    return text, spans


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """The environment is the one of transformers' apply_chat_template, so templates of the hub work unchanged."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} blocks say what to train on; here the text itself tells, so they only show their body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
