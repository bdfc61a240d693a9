"""Ask a model: one prompt, a file of them, or a chat.

python recipes/generate.py --model Llama-3.2-1B-Instruct --prompt "What is the capital of France?"
python recipes/generate.py --model Llama-3.1-8B --adapter out/alpaca/adapter --template none --prompt "Below is ..."
torchrun --nproc_per_node 4 recipes/generate.py --model Llama-3.1-70B-Instruct --prompts questions.jsonl
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from minillama.data.encoders import tools_of
from minillama.data.rows import read_rows
from minillama.errors import UserError
from minillama.formats.hf import read_config
from minillama.formats.hub import find_model
from minillama.formats.quantized import Quantize
from minillama.help import filled
from minillama.inference.generate import check_settings, stream
from minillama.inference.load import Dtype, find_stop_ids, load_model
from minillama.parallel.failures import user_errors
from minillama.parallel.processes import (
    Device,
    group_without_timeout,
    on_rank_zero,
    process_group,
    quiet_but_on_rank_zero,
    rank,
    say,
)
from minillama.tokenizer.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Config:
    """Ask a model: one prompt, a file of them, or a chat. On several processes each holds a part of the model."""

    model: Path
    """Folder of the model, in Hugging Face's format or Meta's; a full fine-tuning's model/; or ORG/NAME of the hub."""
    adapter: Path | None = None
    """Folder of an adapter for it, in PEFT's format."""
    tokenizer: Path | None = None
    """Folder or file of the tokenizer; None: the model's folder."""
    prompt: str | None = None
    """What to ask; the answer is printed as it comes."""
    prompts: Path | None = None
    """A .jsonl, .json, .csv or .parquet file of rows with a `prompt`, or a chat's `messages` and perhaps `tools`; a line
    of JSON is printed for each, with its `answer` and what else the row has."""
    chat: bool = False
    """A conversation: each prompt is put with all that was said before. An empty line ends it."""
    system: str | None = None
    """The system message of a chat."""
    template: Literal["chat", "none"] = "chat"
    """chat: prompts are put to the model in its chat format. none: they are the beginning of a text that it goes on
    with, as after training on samsum, alpaca, grammar or text; BOS is put before it, as in training."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_k: int = 0
    """Choose among so many of the likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 42
    batch_size: int = 8
    """Prompts of a file that are answered together."""
    quantize: Quantize = "none"
    """Hold the linear layers of the blocks in 4 bits a weight (nf4, QLoRA's) or 8 (int8); embedding, norms and head stay
    as they are. none: as the model's folder has them."""
    dtype: Dtype = "auto"
    """What the model computes in. auto: what the hardware multiplies fast, as --fsdp.precision auto does."""
    device: Device = "auto"

    def __post_init__(self) -> None:
        if sum((self.prompt is not None, self.prompts is not None, self.chat)) != 1:
            raise UserError("give one of --prompt, --prompts and --chat")
        if self.chat and self.template == "none":
            raise UserError("--chat needs --template chat")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        check_settings(self.temperature, self.top_k, self.top_p)


def read_prompts(config: Config, tokenizer: Any) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """(The line to print without its answer, the prompt in tokens) for each row of the file."""
    assert config.prompts
    for place, read in read_rows(config.prompts):
        try:
            row = read()
            field = "prompt" if isinstance(row, dict) and "prompt" in row else "messages"
            asked = row.get(field) if isinstance(row, dict) else None
            if not isinstance(asked, str | list) or not asked:
                raise UserError("a row needs the text 'prompt' or the list 'messages'")
            others = {name: value for name, value in row.items() if name != field}
            yield {"prompt": asked} | others, to_tokens(config, tokenizer, asked, tools_of(row))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None


def to_tokens(
    config: Config,
    tokenizer: Any,
    asked: str | list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    if isinstance(asked, str):
        if config.template == "none":
            tokens = tokenizer.encode(asked)
            begun = tokenizer.bos_id is None or tokens[:1] == [tokenizer.bos_id]
            return tokens if begun else [tokenizer.bos_id, *tokens]
        asked = [{"role": "user", "content": asked}]
    first = asked[0] if isinstance(asked[0], dict) else {}
    if config.system is not None and first.get("role") != "system":
        asked = [{"role": "system", "content": config.system}, *asked]
    return tokenizer.chat_prompt(asked, tools)


def main(config: Config) -> None:
    with process_group(config.device) as device:
        config = replace(config, model=find_model(config.model))
        longest = read_config(config.model).max_position_embeddings - config.max_new_tokens  # first: is it a model?
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        if config.prompt is not None:
            to_tokens(config, tokenizer, config.prompt)  # errors in it are reported before the model is loaded
        prompts = list(read_prompts(config, tokenizer)) if config.prompts else []
        if config.prompts and not prompts:
            raise UserError(f"--prompts {config.prompts}: no row in it")
        warned = False

        def warn_of_length(tokens: list[int]) -> None:
            nonlocal warned
            if len(tokens) > longest and not warned and rank() == 0:
                print(
                    f"warning: a prompt of {len(tokens)} tokens and --max-new-tokens {config.max_new_tokens} are more than "
                    f"the {longest + config.max_new_tokens} positions that the model was made for (max_position_embeddings)",
                    file=sys.stderr,
                    flush=True,
                )
                warned = True

        model = load_model(config.model, device, adapter=config.adapter, dtype=config.dtype, quantize=config.quantize)
        if config.template == "chat" and tokenizer.lent_format and rank() == 0:
            text = f"{config.model} has no chat template, and prompts are put to it in {tokenizer.lent_format} format"
            print(f"note: {text}; --template none leaves them as they are", file=sys.stderr, flush=True)
        settings: dict[str, Any] = {
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "seed": config.seed,
            "stop_ids": find_stop_ids(tokenizer, config.model),
        }

        def answer(asked: str | list[dict[str, Any]]) -> str:
            """Printed as it comes, on rank 0."""
            ids: list[int] = []
            shown = ""
            tokens = to_tokens(config, tokenizer, asked)
            warn_of_length(tokens)
            for [token] in stream(model, [tokens], **settings):
                ids.append(token)  # type: ignore[arg-type]  # one prompt: it ends with its answer
                text = tokenizer.decode(ids)
                if not text.endswith("\ufffd") and rank() == 0:  # a character may take several tokens
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
            say(tokenizer.decode(ids)[len(shown) :])
            return tokenizer.decode(ids)

        if config.prompt is not None:
            answer(config.prompt)
        elif config.chat:
            messages: list[dict[str, Any]] = []
            patient = group_without_timeout()
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")
            while asked := on_rank_zero(ask, patient):
                messages.append({"role": "user", "content": asked})
                messages.append({"role": "assistant", "content": answer(messages)})
        else:
            warn_of_length(max((tokens for _, tokens in prompts), key=len))
            for start in range(0, len(prompts), config.batch_size):
                batch = prompts[start : start + config.batch_size]
                columns: list[list[int]] = [[] for _ in batch]
                for tokens in stream(model, [tokens for _, tokens in batch], **settings):
                    for column, token in zip(columns, tokens, strict=True):
                        column += [] if token is None else [token]
                for (line, _), column in zip(batch, columns, strict=True):
                    say(as_json(line | {"answer": tokenizer.decode(column)}))


def as_json(line: dict[str, Any]) -> str:
    """With escapes for everything but ASCII if the terminal cannot show it, or it is half a character."""
    text = json.dumps(line, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return json.dumps(line, default=str)
    return text


def ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    with user_errors():
        with quiet_but_on_rank_zero():
            flags = tyro.cli(filled(Config))
        main(flags)
