"""Measure a model: its loss on rows, and tasks of lm-evaluation-harness; the base, with an adapter, or both side by side.
Of pairs of answers: loss, margin of the rewards and accuracy, as recipes/dpo_fsdp.py tells them.

python recipes/evaluate.py --model Llama-3.2-1B --data.dataset alpaca --data.path test.json
python recipes/evaluate.py --model Llama-3.1-8B --adapter out/alpaca/adapter --compare --tasks arc_easy hellaswag
torchrun --nproc_per_node 4 recipes/evaluate.py --model Llama-3.1-70B --tasks mmlu --num-fewshot 5 --output mmlu.json
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

import gc
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch.distributed as dist
import tyro

from minillama.adapters.lora import LoraConfig, lora_off
from minillama.adapters.peft import read_adapter_config
from minillama.data.datasets import AnyDataConfig
from minillama.data.load import load_evaluation_data
from minillama.data.packing import Packed
from minillama.errors import UserError, disk_text
from minillama.files import write_json
from minillama.formats.hf import read_config
from minillama.formats.hub import find_model
from minillama.formats.quantized import Quantize
from minillama.help import filled
from minillama.inference.load import Dtype, find_stop_ids, load_model
from minillama.parallel.failures import user_errors
from minillama.parallel.processes import Device, on_rank_zero, process_group, quiet_but_on_rank_zero, rank, say
from minillama.progress import progress
from minillama.tokenizer.tokenizer import load_tokenizer
from minillama.training.config import check_seed
from minillama.training.dpo import DpoLoss, PairLossConfig, reference_values
from minillama.training.metrics import means_told
from minillama.training.plan import EvalConfig, eval_batches
from minillama.training.run import described
from minillama.training.step import evaluate


@dataclass(frozen=True)
class Config:
    """Measure a model: its loss on rows (--data.path or --data.val-path), and tasks of lm-evaluation-harness (--tasks).
    On several processes each holds a part of the model, and they share the work."""

    model: Path
    """Folder of the model, in Hugging Face's format or Meta's; a full fine-tuning's model/; or ORG/NAME of the hub."""
    adapter: Path | None = None
    """Folder of an adapter for it, in PEFT's format."""
    compare: bool = False
    """Measure the model without its adapter too."""
    tokenizer: Path | None = None
    """Folder or file of the tokenizer; None: the model's folder."""
    data: AnyDataConfig = AnyDataConfig()
    """Rows to measure the loss on, each once, as a training run's evaluation does it: those of --data.val-path if it is
    given; else the part that --data.val-fraction holds out of --data.path or --data.mixture; else all of those."""
    dpo: PairLossConfig = PairLossConfig()
    reference: Path | None = None
    """Of pairs of answers: folder of what training started from, to which this model is compared: a model, ORG/NAME of
    the hub, or an adapter for --model. None: the model without its LoRA --adapter; --dpo.loss simpo has no reference."""
    tasks: tuple[str, ...] = ()
    """Names of tasks of lm-evaluation-harness, such as arc_easy hellaswag, or of your own; their data come from the
    Hugging Face hub unless a task says otherwise."""
    include_path: Path | None = None
    """A folder of YAML files with your own tasks."""
    num_fewshot: int | None = None
    """Examples before each question; None: as many as the task says."""
    limit: int = 0
    """Questions of each task; 0: all."""
    chat: bool = False
    """Put the tasks to the model in its chat format."""
    max_steps: int = 0
    """Batches of rows per process; 0: all."""
    batch_size: int = 8
    """Packs (padding: rows) and questions that each process takes at a time."""
    quantize: Quantize = "none"
    """Hold the linear layers of the blocks in 4 bits a weight (nf4, QLoRA's) or 8 (int8); embedding, norms and head stay
    as they are. none: as the model's folder has them."""
    dtype: Dtype = "auto"
    """What the model computes in. auto: what the hardware multiplies fast, as --fsdp.precision auto does; a training run's
    own evaluation computes in the same on this machine."""
    output: Path | None = None
    """A JSON file to write the numbers to."""
    seed: int = 42
    """The seed of the training run: it decides which rows --data.val-fraction holds out."""
    device: Device = "auto"

    def __post_init__(self) -> None:
        if not self.tasks and not self.has_rows:
            raise UserError("give what to measure: rows with --data.path or --data.val-path, or --tasks")
        if self.compare and not self.adapter:
            raise UserError("--compare needs the --adapter to compare with the model")
        if not isinstance(self.data, AnyDataConfig) or not self.data.is_own:  # else its rows will tell
            self.check_pairs()
        if self.reference and not self.dpo.has_reference:
            raise UserError(f"--dpo.loss {self.dpo.loss} has no --reference: leave one of them out")
        for name, least in (("batch_size", 1), ("limit", 0), ("max_steps", 0), ("num_fewshot", 0)):
            if (getattr(self, name) or 0) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        check_seed(self.seed)

    def check_pairs(self) -> None:
        given = self.dpo != PairLossConfig() or self.reference
        if given and not self.data.pairs:
            raise UserError("--reference and --dpo are for pairs of answers, --data.dataset preference: leave them out")
        if self.data.pairs and self.dpo.has_reference and not (self.reference or self.adapter):
            raise UserError(
                "pairs of answers are measured against a reference: give the --reference that the model was trained from, "
                "its --adapter, or --dpo.loss simpo, which needs none"
            )

    @property
    def has_rows(self) -> bool:
        return self.data.is_own or any((self.data.path, self.data.val_path, self.data.mixture))


def check_output(output: Path) -> None:
    """Creates the folder of the output. Raises UserError unless a file can be written there."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output.parent):
            pass
        if output.is_file():
            output.open("ab").close()
    except OSError as error:
        text = disk_text(error, f"--output {output}", "cannot be written")
        raise UserError(f"{text}: name a file in a folder that you may write to") from None
    if output.exists() and not output.is_file() and not output.is_dir():
        raise UserError(f"--output {output} is a pipe or a device: name a file")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file in it")


def find_tasks(config: Config) -> Any:
    try:
        from minillama.inference.lm_eval import load_tasks
    except ImportError as error:
        raise UserError(f'--tasks needs lm-evaluation-harness: pip install -e ".[eval]" ({error})') from None
    return load_tasks(config.tasks, config.include_path)


def with_reference(config: Config, reference: Path, rows: Packed, tokenizer: Any, device: str) -> Packed:
    """The rows with the log-probabilities of their labels by the reference, a model or an adapter for --model."""
    adapter = reference if (reference / "adapter_config.json").exists() else None
    reference = config.model if adapter else find_model(reference)
    sizes = [read_config(folder).vocab_size for folder in (config.model, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--reference {reference} has a vocabulary of {sizes[1]} and the model of {sizes[0]}: give its own"
        )
    settings: dict[str, Any] = {"dtype": config.dtype, "quantize": config.quantize, "cache_dir": config.data.cache_dir}
    model = load_model(reference, device, adapter=adapter, **settings)
    values = reference_values(rows, model, config.batch_size, tokenizer.pad_id, device)
    del model
    gc.collect()  # a sharded model is in reference cycles
    return replace(rows, reference=values)


def measure(
    config: Config, adapter: Path | None, tokenizer: Any, rows: Packed | None, tasks: Any, device: str
) -> dict[str, Any]:
    """The results of one column of the table, and the settings behind them."""
    settings: dict[str, Any] = {"dtype": config.dtype, "quantize": config.quantize, "cache_dir": config.data.cache_dir}
    model = load_model(config.model, device, adapter=adapter, **settings)
    found: dict[str, Any] = {}
    if rows:
        ranks = dist.get_world_size()
        limits = EvalConfig(max_steps=config.max_steps, batch_size=config.batch_size)
        batches = eval_batches(rows, limits, tokenizer.pad_id, device, rank(), ranks)
        of_pairs = DpoLoss(config.dpo, lora_off, device) if config.data.pairs else None
        total = -(-len(rows) // (config.batch_size * ranks))
        total = min(total, config.max_steps or total)
        shown = progress(batches, desc="rows", total=total, leave=False)
        result = evaluate(model, shown, loss_function=of_pairs)
        assert result
        loss, tokens = result
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss}: numbers overflow in --dtype {config.dtype}, give fp32; or the model is bad"
            )
        perplexity = math.exp(loss) if loss < 700 else None  # JSON has no infinity
        found |= {"eval_loss": loss}
        if of_pairs:
            found |= {f"eval_{name}": value for name, value in means_told(of_pairs).items()}
        else:
            found |= {"eval_perplexity": perplexity, "eval_tokens": tokens}
    if tasks:
        from minillama.inference.lm_eval import HarnessLM, run_tasks

        lm = HarnessLM(model, tokenizer, find_stop_ids(tokenizer, config.model), config.batch_size)
        limit = config.limit or None
        found["tasks"] = run_tasks(lm, tasks, num_fewshot=config.num_fewshot, limit=limit, chat=config.chat)
    return found


def table(columns: dict[str, dict[str, Any]]) -> str:
    """One line a number, one column a model."""
    lines: dict[str, dict[str, str]] = {}
    for column, found in columns.items():
        for name, value in found.items():
            if name != "tasks":
                lines.setdefault(name, {})[column] = f"{value:.4f}" if isinstance(value, float) else str(value)
        for task, metrics in found.get("tasks", {}).items():
            for key, value in metrics.items():
                metric, _, how = key.partition(",")
                if not how or metric.endswith("_stderr"):
                    continue
                error = metrics.get(f"{metric}_stderr,{how}")
                text = f"{value:.4f}" if isinstance(value, int | float) else str(value)
                text += f" ± {error:.4f}" if isinstance(error, float) else ""
                lines.setdefault(f"{task} {metric}" + f" ({how})" * (how != "none"), {})[column] = text
    rows = [["", *columns], *([name, *(cells.get(c, "") for c in columns)] for name, cells in lines.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(config: Config) -> None:
    with process_group(config.device) as device:
        if output := config.output:
            on_rank_zero(lambda: check_output(output))
        config = replace(config, model=find_model(config.model))
        model = read_config(config.model)
        tokenizer = load_tokenizer(config.tokenizer or config.model, day=config.data.day)
        if config.has_rows:
            split = "train" if config.data.val_fraction else "validation"
            config = replace(config, data=config.data.seen(tokenizer, split))
            config.check_pairs()
        if config.data.pairs and config.dpo.has_reference and not config.reference:
            assert config.adapter
            if not isinstance(read_adapter_config(config.adapter), LoraConfig):
                raise UserError(
                    f"{config.adapter} is no LoRA, which can be switched off: give the base as --reference too"
                )
        tasks = find_tasks(config) if config.tasks else None
        rows = None
        if config.has_rows:
            rows = load_evaluation_data(config.data, tokenizer, model.vocab_size, config.seed)
            say(f"rows        {described(rows, model, config.batch_size, dist.get_world_size())}")
            if config.reference:
                rows = with_reference(config, config.reference, rows, tokenizer, device)
        # the adapted model first: an adapter that does not fit is found before anything is measured
        adapters = {"adapted": config.adapter} if config.adapter else {}
        adapters |= {"base": None} if config.compare or not config.adapter else {}
        columns = {}
        for name, adapter in adapters.items():
            columns[name] = measure(config, adapter, tokenizer, rows, tasks, device)
            gc.collect()  # a sharded model is in reference cycles
        columns = dict(reversed(columns.items()))
        say(table(columns))
        if output:
            flags = json.loads(json.dumps(asdict(config), default=str))
            content = {"flags": flags, "world_size": dist.get_world_size(), "results": columns}
            on_rank_zero(lambda: write_json(output, content))


if __name__ == "__main__":
    here = Path(__file__).resolve().parent  # lm-eval's `import evaluate` means a package, not this file
    sys.path = [path for path in sys.path if Path(path).resolve() != here]
    with user_errors():
        with quiet_but_on_rank_zero():
            flags = tyro.cli(filled(Config))
        main(flags)
