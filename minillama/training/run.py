"""What a run decides before its model gets memory, and what it says at its start and end."""

from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from shlex import join, quote
from typing import Any, TypeVar

from torch.distributed.device_mesh import DeviceMesh

from minillama.data.datasets import DataConfig, training_sources, validation_source
from minillama.data.load import load_data
from minillama.data.packing import Packed
from minillama.errors import UserError
from minillama.files import read_for_all
from minillama.formats.hub import SMALL_FILES, find_model, model_name
from minillama.formats.meta import Weights
from minillama.hardware.kernels import choose_kernels
from minillama.hardware.precision import choose_precision, compact_base
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.model.quant import quantized_layers
from minillama.parallel.heartbeat import stand
from minillama.parallel.processes import on_rank_zero, rank, say, warn
from minillama.parallel.sharding import FsdpConfig, choose_strategy, make_mesh, set_dtypes
from minillama.tokenizer.tokenizer import load_tokenizer
from minillama.training.config import RunConfig
from minillama.training.flops import count_parameters
from minillama.training.metrics import plot_loss
from minillama.training.out_of_memory import check_context_fits
from minillama.training.output_folder import find_start, start_run
from minillama.training.plan import Progress, count_steps
from minillama.training.resume import Checkpoint

C = TypeVar("C", bound="RunConfig")


@dataclass(frozen=True)
class Run:
    """What a run has decided before its model gets memory."""

    device: str
    fsdp: FsdpConfig
    """With strategy and precision resolved"""
    mesh: DeviceMesh
    tokenizer: Any
    train: Packed
    validation: Packed | None
    progress: Progress
    """Where it starts"""
    checkpoint: Checkpoint | None
    """The checkpoint it resumes from; None: it starts from the base model"""
    fingerprints: dict[str, str]
    """Of the base model and of the training data; a run that resumes must have the same"""

    @property
    def parameter_device(self) -> str:
        """Where the parameters live."""
        return "cpu" if self.fsdp.cpu_offload else self.device


def resolve(config: C, device: str) -> tuple[C, Checkpoint | None, str]:
    """config with its hub id, precision and date resolved, the checkpoint to resume from, and the precision as text.

    Every rank must call it. Raises UserError for a model that is not there and for --resume without a sound checkpoint.
    """
    config = replace(config, model=find_model(config.model))
    read_for_all(config.model, SMALL_FILES)
    if tokenizer := config.tokenizer:
        read_for_all(
            *(tokenizer.parent, (*SMALL_FILES, tokenizer.name)) if tokenizer.is_file() else (tokenizer, SMALL_FILES)
        )
    checkpoint = find_start(config)
    saved = checkpoint.content["flags"]["fsdp"]["precision"] if checkpoint else None
    fsdp, precision = choose_precision(config.fsdp, device, saved=saved, cache_dir=config.data.cache_dir)
    return replace(config, fsdp=fsdp, data=with_date(config.data, checkpoint)), checkpoint, precision


def with_date(config: DataConfig, checkpoint: Checkpoint | None) -> DataConfig:
    """config with the date for chat templates: the one given, else that of the checkpoint, else today.

    Every rank must call it, and gets rank 0's date: on another machine it may be tomorrow already.
    """
    saved = checkpoint.content["flags"]["data"].get("date") if checkpoint else None
    return replace(config, date=config.date or saved or on_rank_zero(lambda: date.today().isoformat()))


def prepare_run(
    config: RunConfig, model: Llama, weights: Weights, device: str, checkpoint: Checkpoint | None, precision: str
) -> Run:
    """Decides dtypes, strategy, mesh and attention for a model on the meta device, reads the data, writes run.json.

    weights: of the base model; config, checkpoint, precision: as `resolve` returns them. Prints the run's summary.
    Every rank must call it. Raises UserError for what is wrong with data and flags, before any weight is read.
    """
    set_dtypes(model, config.fsdp)
    fsdp = choose_strategy(model, config.fsdp, device)
    mesh = make_mesh(fsdp, device)
    precision += compact_base(model, weights, fsdp, mesh)
    saved = checkpoint.attention(device) if checkpoint else None
    attention = choose_kernels(model, config.kernels, fsdp.compute_dtype, device, config.data.cache_dir, saved)
    tokenizer = load_tokenizer(config.tokenizer or config.model, day=config.data.day)
    stand("preparing the data")
    train, validation = load_data(
        config.data, tokenizer, model.config.vocab_size, config.seed, validation=config.eval.enabled
    )
    check_context_fits(train, model, fsdp.compute_dtype, device)
    progress, fingerprints = start_run(config, train, checkpoint)
    run = Run(device, fsdp, mesh, tokenizer, train, validation, progress, checkpoint, fingerprints)
    say(summary(config, run, model, precision, attention))
    return run


def summary(config: RunConfig, run: Run, model: Llama, precision: str, attention: str) -> str:
    """What a run will do, in a few lines. precision, attention: which, and why."""
    fsdp, mesh = run.fsdp, run.mesh
    total, trained = count_parameters(model)
    spread = fsdp.strategy + (f" of {mesh.size(1)}" if fsdp.strategy == "hybrid-shard" else "")
    if fsdp.strategy != config.fsdp.strategy:
        spread += f" (chosen by {config.fsdp.strategy})"
    lines = [
        f"model       {total:,} parameters, {trained:,} of them trained ({trained / total:.3%})",
        f"processes   {mesh.size()} on {mesh.device_type}, {spread}{', offloaded' if fsdp.cpu_offload else ''}, "
        f"recompute {fsdp.recompute}",
        f"precision   {precision}",
        f"attention   {attention}{'; blocks compiled' if config.kernels.compile else ''}",
    ]
    if (config.data.pairs or config.data.dataset == "chat") and (lent := run.tokenizer.lent_format):
        lines.append(f"chat        {lent} format, as the tokenizer has no chat template")
    if layers := quantized_layers(model).values():
        size = sum(layer.nbytes for layer in layers) / sum(layer.in_features * layer.out_features for layer in layers)
        lines.insert(
            1, f"base        {len(layers)} linear layers in {next(iter(layers)).kind}, {size:.3f} bytes a weight"
        )
    train, optim = config.train, config.optim
    steps = count_steps(run.train, train, run.progress.packs_per_step)
    text = described(run.train, model.config, train.batch_size, mesh.size(), train.accumulate)
    lines.append(f"training    {text}")
    if run.validation:
        text = described(run.validation, model.config, config.eval.batch_size, mesh.size())
    lines.append(f"validation  {text if run.validation else 'none'}")
    lines.append(
        f"steps       {steps}, {optim.kind}, learning rate {optim.lr:g} "
        f"({optim.schedule}, {optim.warmup_steps} steps of warmup), weight decay {optim.weight_decay:g}"
    )
    lines.append(f"output      {config.output_dir}")
    return "\n".join(lines)


def finish_run(config: RunConfig) -> None:
    """Draws loss.png, and prints the next command. A failure to draw only warns: everything is saved."""
    if rank() != 0:
        return
    output = config.output_dir
    try:
        if not plot_loss(output / "metrics.jsonl", output / "loss.png"):
            say(f"loss.png: not drawn without matplotlib: pip install matplotlib, tools/plot_metrics.py {output}")
    except UserError as error:
        warn(str(error))
    for command in next_commands(config):
        say(f"next: {command}")


def next_commands(config: RunConfig) -> list[str]:
    """The commands after a run: to ask the model, to measure it and, with LoRA, to merge it."""
    output, base, data = config.output_dir, quote(model_name(config.model)), config.data
    adapter, merged = quote(str(output / "adapter")), quote(str(output / "model"))
    trained, tokenizer = f"--model {merged}", ""
    if (output / "adapter").is_dir():
        flags: Any = getattr(config, "lora", None) or getattr(config, "adapter", None)
        trained = f"--model {base} --adapter {adapter}"
        trained += f" --quantize {flags.quantize}" if flags.quantize != "none" else ""
        tokenizer = f" --tokenizer {quote(str(config.tokenizer))}" if config.tokenizer else ""
    template = "" if data.pairs or data.dataset == "chat" else " --template none"
    commands = [f"python recipes/generate.py {trained}{tokenizer}{template} --prompt TEXT"]
    rows = flags_of_rows(data, config.seed, evaluated=config.eval.enabled)
    measured = [f"{trained}{tokenizer}"]
    if "--quantize" in trained and (output / "model").is_dir():  # merged into the plain base
        measured.append(f"--model {merged}")
    if not data.pairs:
        commands += [f"python recipes/evaluate.py {of} {rows}" for of in measured]
    else:
        own: Any = config
        reference = model_name(config.model) if own.method == "full" else own.lora.from_
        commands.append(f"python recipes/evaluate.py {measured[0]} {rows}{flags_of_pairs(own.dpo, reference)}")
    if hasattr(config, "lora") and not (output / "model").is_dir():
        commands.append(f"python tools/merge_lora.py {base} {adapter} {merged}{tokenizer}")
    return commands


def flags_of_rows(data: DataConfig, seed: int, *, evaluated: bool) -> str:
    """The flags by which evaluate.py measures the rows that a run held out; if it held none out, FILE stands for yours.

    data, seed, evaluated: of the run.
    """
    rows: dict[str, Any] = {"path": "FILE"}
    if data.is_own:
        rows = {"path": data.path, "val_path": data.val_path, "val_fraction": data.val_fraction}
    elif data.val_path:
        rows = {"path": data.val_path}
    elif evaluated and data.val_fraction:
        path = None if data.mixture else data.path or training_sources(data)[0].file()
        rows = {"path": path, "mixture": data.mixture, "val_fraction": data.val_fraction}
    elif evaluated and not data.path and (source := validation_source(data)):
        rows = {"path": source.file()}
    kept = ("columns", "train_on", "batching", "context_length", "too_long", "bad_rows")
    values = {"dataset": data.dataset} | rows | {name: getattr(data, name) for name in kept}
    words: list[str] = []
    for field in fields(DataConfig):
        value = values.get(field.name)
        if field.name == "dataset" or value not in (None, field.default):
            words += [
                f"--data.{field.name.replace('_', '-')}",
                *map(str, value if isinstance(value, tuple) else [value]),
            ]
    if rows.get("val_fraction") and seed != RunConfig.seed:
        words += ["--seed", str(seed)]
    return join(words)


def flags_of_pairs(dpo: Any, reference: Path | str | None) -> str:
    """The flags by which evaluate.py does what the evaluation of a DPO run with this loss did, with a space before them.

    dpo: DpoConfig. reference: the folder of the reference; None: the base, without the adapter that was trained.
    """
    flags = f" --reference {quote(str(reference))}" if reference and dpo.has_reference else ""
    for field in fields(dpo):
        value = getattr(dpo, field.name)
        if field.name != "precompute" and value != field.default:
            flags += f" --dpo.{field.name.replace('_', '-')}" + f" {value}" * (value is not True)
    return flags


def described(packed: Packed, config: LlamaConfig, batch_size: int, world_size: int, accumulate: int = 1) -> str:
    """How many rows, tokens and packs there are, and what was left out of them. config: the model's."""
    per_row = packed.documents.per_row
    rows = "rows and pieces of rows" if packed.long["split"] else "rows" if per_row == 1 else "pairs"
    text = f"{len(packed.sizes) // per_row:,} {rows}, {packed.tokens:,} tokens, "
    if packed.batching == "padding":
        text += f"batches of {batch_size} padded to the longest"
    else:
        text += f"{len(packed):,} pack{'s' * (len(packed) != 1)} of {packed.context_length}"
    text += f" ({packed.efficiency(batch_size, world_size, accumulate):.1%} full)"
    for what in ("dropped", "truncated", "split"):
        if packed.long[what]:
            text += f"; {packed.long[what]:,} longer than {packed.context_length} {what.upper()}"
    if packed.long["untrained"]:
        text += f", of which {packed.long['untrained']:,} {rows} LEFT OUT, with nothing to train"
    if packed.documents.refused:
        text += f"; {packed.documents.refused:,} bad ones SKIPPED"
    if packed.documents.had_ends:
        text += f"; {packed.documents.had_ends:,} had BOS or EOS in their text, and were given no second one"
    if (longest := int(packed.sizes.max())) > (limit := config.max_position_embeddings):
        text += f"; the longest, {longest}, BEYOND the {limit} the model was made for"
    return text
