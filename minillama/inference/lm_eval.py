"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a model of ours.

Texts are tokenized and scored as in the harness' own class for transformers' models, so that scores agree: contexts are
truncated on the left to the model's length, and a text without a context follows BOS (EOS if there is no BOS).
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from minillama.errors import UserError
from minillama.inference.generate import stream
from minillama.model.llama import Llama
from minillama.parallel.processes import all_reduce, quiet_but_on_rank_zero, say
from minillama.progress import progress

LOGIT_ROWS = 8192
"""A batch of several sequences has at most so many positions with logits."""

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Tasks' names for the number of tokens to generate; the first that is there counts"""
SETTINGS = {"until", "do_sample", "temperature", "top_k", "top_p", *LENGTHS}


class HarnessLM(TemplateLM):
    """A Llama behind the harness' LM interface.

    On several ranks, all must get the same requests: they share the batches of loglikelihoods, and generate together.
    """

    def __init__(self, model: Llama, tokenizer: Any, stop_ids: set[int], batch_size: int) -> None:
        super().__init__()
        self.model, self.text, self.stop_ids, self.batch_size = model, tokenizer, stop_ids, batch_size
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.text.eos_id if self.text.bos_id is None else self.text.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.text.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        bos = self.text.adds_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.text.decode([self.prefix_token_id])):
            bos = False  # a chat template has added it
        return self.text.encode(string, bos=bos)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if add_generation_prompt:
            return self.text.chat_text(chat_history)
        return self.text.chat_text(chat_history[:-1]) + chat_history[-1]["content"]  # the beginning of the answer

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(Log-probability in nats, whether it is what greedy decoding gives) of each continuation.

        requests: (texts, tokens of the context, tokens of the continuation). Those whose tokens but the last are the
        same, such as the letters of a multiple choice, share a forward.
        """
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        cut = sum(len(context + continuation) > self.max_length + 1 for _, context, continuation in requests)
        if cut:
            say(
                f"{cut} of {len(requests)} contexts are too long for the model's {self.max_length}: their beginning is cut"
            )
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens is longer than the {self.max_length} that the model "
                    "was made for: leave its task out"
                )
            sharing[tuple((context + continuation)[-self.max_length - 1 : -1])].append(number)
        wanted = {tokens: max(len(requests[n][2]) for n in numbers) for tokens, numbers in sharing.items()}
        batches = list(self._batches(wanted))
        values, greedy = [0.0] * len(requests), [0.0] * len(requests)
        own, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for first in progress(range(0, len(batches), ranks), desc="loglikelihoods", disable=disable_tqdm, leave=False):
            mine = first + own
            # All ranks must call a sharded model equally often: if batches are left over, one is computed twice.
            batch = batches[min(mine, len(batches) - 1)]
            for tokens, logits in zip(batch, self._logits(batch, wanted), strict=True):
                norms = torch.cat([rows.float().logsumexp(-1) for rows in logits.split(256)])
                likeliest = logits.argmax(-1)
                for number in sharing[tokens] if mine < len(batches) else ():
                    labels = torch.tensor(requests[number][2], device=logits.device)
                    count = len(labels)
                    chosen = logits[-count:].gather(-1, labels[:, None])[:, 0].float()
                    values[number] = (chosen - norms[-count:]).sum(dtype=torch.float64).item()
                    greedy[number] = float((likeliest[-count:] == labels).all())
        if ranks > 1:
            values, greedy = all_reduce(values), all_reduce(greedy)
        return [(value, likely > 0) for value, likely in zip(values, greedy, strict=True)]

    def _batches(self, wanted: dict[tuple[int, ...], int]) -> Iterator[list[tuple[int, ...]]]:
        """Batches of sequences of similar length, the longest first. wanted: how many last positions of each need logits."""
        batch: list[tuple[int, ...]] = []
        rows = 0
        for tokens in sorted(wanted, key=len, reverse=True):
            if batch and (len(batch) == self.batch_size or rows + wanted[tokens] > LOGIT_ROWS):
                yield batch
                batch, rows = [], 0
            batch.append(tokens)
            rows += wanted[tokens]
        if batch:
            yield batch

    def _logits(self, batch: list[tuple[int, ...]], wanted: dict[tuple[int, ...], int]) -> Sequence[Tensor]:
        """The logits (wanted, V) of the last positions of each sequence."""
        shape = len(batch), len(batch[0])
        tokens, keep = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = torch.tensor(ids)  # none of them attends to padding on the right
            keep[row, len(ids) - wanted[ids] : len(ids)] = True
        device = next(self.model.parameters()).device
        logits = self.model(tokens.to(device), keep=keep.to(device))
        return logits.split([wanted[ids] for ids in batch])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the model's length if it is longer."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its stop strings."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        batches = []
        for numbers in alike.values():
            settings, until = self._settings(requests[numbers[0]])
            room = self.max_length - settings["max_new_tokens"]
            prompts = {n: (self.tok_encode(requests[n].args[0]) or [self.prefix_token_id])[-room:] for n in numbers}
            numbers.sort(key=lambda n: -len(prompts[n]))
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                batches.append((batch, [prompts[n] for n in batch], settings, until))
        answers = [""] * len(requests)
        for seed, (batch, contexts, settings, until) in enumerate(
            progress(batches, desc="answers", disable=disable_tqdm, leave=False)
        ):
            columns = stream(self.model, contexts, seed=seed, stop_ids=self.stop_ids, **settings)
            for number, answer in zip(batch, self._answers(columns, len(batch), until), strict=True):
                answers[number] = answer
        return answers

    def _settings(self, request: Any) -> tuple[dict[str, Any], list[str]]:
        """For `stream`, and the strings that end an answer."""
        given = {name: value for name, value in request.args[1].items() if value is not None}
        task = request.task_name
        if given.pop("num_beams", 1) != 1 or given.keys() - SETTINGS:
            unknown = min(given.keys() - SETTINGS, default="num_beams")
            raise UserError(f"task {task} wants the generation setting {unknown}, which is not supported here")
        length = next((int(given[name]) for name in LENGTHS if name in given), 256)
        if not 0 < length < self.max_length:
            raise UserError(
                f"task {task} wants up to {length} new tokens; the model was made for {self.max_length} with the prompt"
            )
        temperature = float(given.get("temperature", 0.0))
        settings = {"max_new_tokens": length, "temperature": temperature if given.get("do_sample", True) else 0.0}
        settings |= {name: given[name] for name in ("top_k", "top_p") if name in given}
        until = given.get("until", [])
        until = [until] if isinstance(until, str) else list(until)
        return settings, [text for text in (*until, self.text.decode([self.text.eos_id])) if text]

    def _answers(self, columns: Iterator[list[int | None]], count: int, until: list[str]) -> list[str]:
        """The answers to `count` prompts, from the tokens of each step; stops when nothing can change them any more."""
        longest = max(len(text.encode()) for text in until) + 1  # tokens that a stop string can span
        rows: list[list[int]] = [[] for _ in range(count)]
        stopped = [False] * count
        for column in columns:
            for n, token in enumerate(column):
                if token is not None and not stopped[n]:
                    rows[n].append(token)
                    recent = self.text.decode(rows[n][-longest:], special=False)
                    stopped[n] = any(text in recent for text in until)
            if all(done or token is None for done, token in zip(stopped, column, strict=True)):
                break
        answers = [self.text.decode(row, special=False) for row in rows]
        return [min((answer.partition(text)[0] for text in until), key=len) for answer in answers]


def load_tasks(names: Sequence[str], include_path: Path | None) -> tuple[TaskManager, list[Any]]:
    """The harness' tasks, groups and tags of these names, and those of the YAML files in the folder include_path.

    Returns the harness' task manager, and the loaded tasks. Raises UserError for an unknown name, and for data that cannot
    be loaded.
    """
    if include_path and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is no folder: give one with YAML files of tasks")
    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if not manager or not set(names) <= set(manager.all_subtasks):  # the harness' own thousands take seconds to index
        manager = TaskManager(include_path=include_path)
    tasks: list[Any] = []
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists the names."
            raise UserError(f"--tasks {name}: no such task; {hint} Your own: --include-path")
        try:
            loaded = manager.load(name)
        except Exception as error:  # no connection, a data set that is gone, a damaged YAML file: each has its own type
            raise UserError(f"--tasks {name} cannot be loaded: {error}") from error
        tasks += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return manager, tasks


def run_tasks(
    lm: HarnessLM, loaded: tuple[TaskManager, list[Any]], *, num_fewshot: int | None, limit: int | None, chat: bool
) -> dict[str, dict[str, Any]]:
    """The harness' results for each task and group, on the first rank of each machine; {} on others.

    loaded: as load_tasks returns it. Every rank must call it. Raises UserError for what the harness refuses.
    """
    manager, tasks = loaded
    try:
        with quiet_but_on_rank_zero():
            found = simple_evaluate(
                lm,
                tasks=tasks,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                log_samples=False,
            )
    except ValueError as error:
        raise UserError(f"lm-eval: {error}") from error
    results = found["results"] if found else {}
    return {
        task: {k: v.item() if isinstance(v, np.generic) else v for k, v in m.items()} for task, m in results.items()
    }
