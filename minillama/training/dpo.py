"""Direct preference optimization (https://arxiv.org/abs/2305.18290): losses of pairs of answers."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.data.batch import Batch, collate
from minillama.data.cache import keep_reference, open_reference
from minillama.data.packing import Packed
from minillama.errors import UserError
from minillama.files import described
from minillama.model.llama import Llama
from minillama.model.quant import quantized_layers
from minillama.parallel.heartbeat import stand
from minillama.parallel.processes import all_reduce, on_each_node, rank, say
from minillama.parallel.sharding import local, reshard
from minillama.progress import progress
from minillama.training.run import Run


@dataclass(frozen=True)
class PairLossConfig:
    """How the answers of a pair are compared."""

    beta: float = 0.1
    """How strongly the model is held to the reference: the reward of an answer is beta times the logarithm of how much
    likelier the model makes it than the reference does."""
    loss: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    """sigmoid: that of the DPO paper. hinge: no more is asked of a pair whose rewards are 1 apart. ipo: the logarithms
    are to be 1 / (2 beta) apart, no more and no less (https://arxiv.org/abs/2310.12036). simpo: there is no reference; the
    reward is beta times the log-probability a token (https://arxiv.org/abs/2405.14734), with a --dpo.beta of 2 to 10."""
    gamma: float = 0.5
    """How far apart rewards are to be under --dpo.loss simpo, whose paper takes 0.3 to 1.6."""
    label_smoothing: float = 0.0
    """Part of the pairs that are taken to have their answers swapped, with the sigmoid loss: conservative DPO."""
    normalize_length: bool = False
    """Take an answer's log-probability a token, not their sum, so that long answers have no advantage. TRL's ipo does."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"--dpo.beta {self.beta}: must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--dpo.label-smoothing {self.label_smoothing}: must be at least 0 and below 0.5")
        if self.label_smoothing and self.loss != "sigmoid":
            raise UserError(f"--dpo.label-smoothing is for --dpo.loss sigmoid, not for {self.loss}: leave it out")
        if not math.isfinite(self.gamma):
            raise UserError(f"--dpo.gamma {self.gamma}: must be a number")
        if self.gamma != PairLossConfig.gamma and self.loss != "simpo":
            raise UserError(f"--dpo.gamma is for --dpo.loss simpo, not for {self.loss}: leave it out")

    @property
    def has_reference(self) -> bool:
        return self.loss != "simpo"


@dataclass(frozen=True)
class DpoConfig(PairLossConfig):
    """What is learned from pairs of answers."""

    precompute: bool = False
    """Compute the reference's log-probabilities once before training and keep them in the data cache: no second forward
    a step, and no memory for a reference. Worth it from the second epoch on, or the second run on the same data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precompute and not self.has_reference:
            raise UserError(f"--dpo.precompute is of a reference, and --dpo.loss {self.loss} has none: leave it out")


def preference_losses(chosen: Tensor, rejected: Tensor, config: PairLossConfig) -> Tensor:
    """Of each pair, given log(model's probability / reference's) of its answers: all (pairs,) fp32. Of simpo, which has no
    reference, given their log-probabilities a token.

    With h = chosen - rejected: sigmoid is -log sigmoid(beta h), equation 7 of https://arxiv.org/abs/2305.18290, or with
    label smoothing e, -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), equation 3 of
    https://ericmitchell.ai/cdpo.pdf; hinge is max(0, 1 - beta h) (https://arxiv.org/abs/2305.10425); ipo is
    (h - 1 / (2 beta))^2, equation 17 of https://arxiv.org/abs/2310.12036; simpo is -log sigmoid(beta h - gamma), equation 6
    of https://arxiv.org/abs/2405.14734.
    """
    difference = chosen - rejected
    if config.loss == "hinge":
        return F.relu(1 - config.beta * difference)
    if config.loss == "ipo":
        return (difference - 1 / (2 * config.beta)).square()
    margin = config.beta * difference - (config.gamma if config.loss == "simpo" else 0)
    return -(1 - config.label_smoothing) * F.logsigmoid(margin) - config.label_smoothing * F.logsigmoid(-margin)


def answer_sums(values: Tensor, counts: Tensor) -> Tensor:
    """Sums (answers,) of values (N,), one a token, answer after answer; counts (answers,) int64: of their tokens."""
    return torch.segment_reduce(values, "sum", lengths=counts, unsafe=True)  # to check them would wait for a GPU


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Of each label of a batch, row after row: fp32 (N,)."""
    return model(batch.tokens, positions=batch.positions, lengths=batch.lengths, labels=batch.targets, per_label=True)


class FrozenWeights:
    """A copy of the trained parameters as they are now, of each its part on this rank."""

    def __init__(self, model: nn.Module) -> None:
        self.copies = {p: local(p).detach().clone() for p in model.parameters() if p.requires_grad}

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """The model with these instead of its own, and without dropout."""
        was_training = model.training
        model.eval()
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)
            model.train(was_training)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        reshard(model)  # else a forward would take what was gathered before
        if any(copy.is_cpu for copy in self.copies.values()) and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # with --fsdp.cpu-offload the GPU may still be copying the last forward's from the host
        for parameter, copy in self.copies.items():
            own = local(parameter).clone()
            local(parameter).copy_(copy)
            copy.copy_(own)


def adapter_fingerprint(folder: Path | None) -> str:
    """The same for an adapter folder of the same content; "" without one."""
    files = [described(folder / f"adapter_{name}") for name in ("model.safetensors", "config.json")] if folder else []
    return hashlib.blake2b(json.dumps(files).encode(), digest_size=16).hexdigest() if files else ""


def precompute(run: Run, model: Llama, batch_size: int) -> Run:
    """run with the log-probabilities of all its labels by the model as it is now: from the data cache, or computed and kept
    there. batch_size: packs a rank at a time. Every rank must call it."""
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    kinds = sorted({layer.kind for layer in quantized_layers(model).values()})
    of_reference = [run.fingerprints["model"], run.fingerprints.get("reference", "")]
    named = json.dumps([of_reference, kinds, dtypes, str(run.fsdp.compute_dtype)])
    key = hashlib.blake2b(named.encode(), digest_size=16).hexdigest()
    train, validation = (
        packed and _with_reference(packed, model, key, batch_size, run.tokenizer.pad_id, run.device)
        for packed in (run.train, run.validation)
    )
    assert train
    return replace(run, train=train, validation=validation)


@torch.no_grad()
def reference_values(packed: Packed, model: Llama, batch_size: int, pad_id: int, device: str) -> np.ndarray:
    """Packed.reference by this model, without dropout. batch_size: packs a rank at a time. Every rank must call it."""
    stand("computing the reference's log-probabilities")
    values = np.full(len(packed.documents.tokens), -np.inf, np.float32)
    model.eval()
    step = batch_size * dist.get_world_size()
    for cursor in progress(range(0, len(packed), step), desc="reference", leave=False):
        window = np.arange(cursor, min(cursor + step, len(packed)))
        [packs] = packed.micro_batches(window, batch_size, rank(), dist.get_world_size())
        batch = collate(packed, packs, pad_id, device)
        values[packed.labels(packs)] = log_probabilities(model, batch).cpu().numpy()
    reshard(model)
    dist.all_reduce(torch.from_numpy(values), dist.ReduceOp.MAX)  # each was computed on one rank, or on some alike
    return values


def _with_reference(packed: Packed, model: Llama, key: str, batch_size: int, pad_id: int, device: str) -> Packed:
    folder = packed.folder
    assert folder is not None
    missing = float(on_each_node(lambda: open_reference(folder, key) is None))
    if all_reduce([missing], "max")[0]:
        say(f"reference   its log-probabilities of {len(packed):,} packs are computed once")
        values = reference_values(packed, model, batch_size, pad_id, device)
        on_each_node(lambda: keep_reference(folder, key, values))
    reference = open_reference(folder, key)
    if reference is None:
        raise UserError(
            f"the reference in {folder} cannot be read back: give another --data.cache-dir, or train without it"
        )
    return replace(packed, reference=reference)


class DpoLoss:
    """The loss of a pair, for train_step and evaluate, and what metrics.jsonl tells of pairs.

    reward_margin: beta times by how much more the model has raised the chosen answer's log-probability over the
    reference's than the rejected one's; accuracy: the share of pairs in which that is above 0, ties being half;
    chosen_logp, rejected_logp: of whole answers, in nats; kl: an estimate of how far the model is from the reference, in
    nats an answer, sum(r - 1 - log r) over its tokens with r = model / reference (k3 of
    http://joschu.net/blog/kl-approx.html), unbiased where answers are the reference's own. Of simpo, without a reference:
    reward_margin: beta times the difference of the log-probabilities a token; and no kl.
    """

    names: tuple[str, ...] = ("pairs", "reward_margin", "accuracy", "chosen_logp", "rejected_logp", "kl")

    def __init__(
        self, config: PairLossConfig, as_reference: Callable[[nn.Module], AbstractContextManager[None]], device: str
    ) -> None:
        """as_reference: within it the model is the reference, if the loss has one."""
        self.config, self.as_reference = config, as_reference
        if not config.has_reference:
            self.names = self.names[:-1]
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum over the pairs: fp32 ()."""
        reference, counts = batch.reference, batch.labels_of_documents
        if reference is None and self.config.has_reference:
            # FSDP's order of the last forward includes this one's. So at the end of the backward it gathers the head once
            # more, in vain.
            with torch.no_grad(), self.as_reference(model):
                reference = log_probabilities(model, batch)
        ours = log_probabilities(model, batch)
        log_ratio = ours if reference is None else ours - reference
        ratios = answer_sums(log_ratio, counts)
        if self.config.normalize_length or not self.config.has_reference:
            ratios = ratios / counts
        chosen, rejected = ratios.view(-1, 2).unbind(1)
        with torch.no_grad():
            margins = self.config.beta * (chosen - rejected)
            logps = answer_sums(ours, counts).view(-1, 2)
            kl = (log_ratio.exp() - 1 - log_ratio).sum() / 2  # two answers a pair
            accuracy = (margins.sign() + 1) / 2  # a tie, as all are before the first step, is half right
            told = torch.stack((margins.sum(), accuracy.sum(), *logps.sum(0), kl))
            self.sums[0] += len(margins)
            self.sums[1:] += told[: len(self.sums) - 1]
        return preference_losses(chosen, rejected, self.config).sum()

    def count(self, batch: Batch) -> int:
        """Pairs"""
        return len(batch.labels_of_documents) // 2
