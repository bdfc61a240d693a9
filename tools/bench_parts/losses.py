"""The loss alone, for tools/bench.py --loss, with the gradients of hidden states and, if all trains, of the head."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from work import Job, Work, compute_dtype, parameter_value

from minillama.errors import UserError
from minillama.model.loss import linear_cross_entropy


class Loss:
    def __init__(self, job: Job, stack: contextlib.ExitStack) -> None:
        self.job, self.contender = job, job["contender"]
        vocabulary, width = job["config"]["vocab_size"], job["config"]["hidden_size"]

        def drawn(name: str, *shape: int) -> Tensor:
            return parameter_value(name, torch.empty(shape, device=job["device"]), width).to(compute_dtype(job))

        self.weight = drawn("head", vocabulary, width).requires_grad_(job["method"] == "full")
        hidden = drawn("hidden", job["batch_size"], job["context_length"], width) * width**0.5
        self.hidden = hidden.requires_grad_()
        if self.contender == "torch" and not hasattr(F, "linear_cross_entropy"):
            raise UserError(f"torch {torch.__version__} has no F.linear_cross_entropy")

    def step(self, work: Work) -> tuple[Tensor, Tensor]:
        """(Mean loss, norm of the gradient of the hidden states)."""
        flat, labels = self.hidden.flatten(0, 1), work.labels.flatten().to(self.hidden.device)
        if self.contender == "ours":
            loss = linear_cross_entropy(self.hidden, self.weight, work.labels) / work.trained
        elif self.contender == "torch":
            options = torch.nn.LinearCrossEntropyOptions()  # its own choice of chunks
            loss = F.linear_cross_entropy(flat, self.weight, labels, ignore_index=-100, options=options)
        else:
            loss = F.cross_entropy(F.linear(flat, self.weight).float(), labels)
        loss.backward()
        assert self.hidden.grad is not None
        norm = torch.linalg.vector_norm(self.hidden.grad, dtype=torch.float32)
        self.hidden.grad = self.weight.grad = None
        return loss.detach(), norm
