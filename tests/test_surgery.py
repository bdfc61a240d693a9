"""What a fork adds from outside: an adapter, an attention, a loss, on one process and sharded."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import random_model, run_ranks
from peft import IA3Config, get_peft_model
from test_distributed import whole
from test_model import hf_reference
from test_packing import documents_of
from torch import nn

from minillama import replace_modules
from minillama.data.batch import collate
from minillama.data.packing import pad
from minillama.errors import UserError
from minillama.formats.hf import load_weights, read_config
from minillama.model.llama import Llama, LMHead
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.sharding import FsdpConfig, like, local, set_dtypes, shard
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.step import train_step


class Scaled(nn.Module):
    """(IA)^3 in a few lines, as a fork would write it: keeps the name `weight`, adds one vector."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight
        self.scale = nn.Parameter(torch.ones(linear.out_features))

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)
        nn.init.ones_(self.scale)

    def forward(self, x):
        return F.linear(x, self.weight) * self.scale


def test_a_new_adapter_starts_as_the_base_and_trains():
    model = random_model().requires_grad_(False)
    tokens = torch.randint(0, 512, (1, 10))
    before = model(tokens)
    replace_modules(model, lambda name, _: name.endswith(("k_proj", "v_proj", "up_proj")), Scaled)
    after = model(tokens)
    assert torch.equal(before, after)
    after.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 9 and all(name.endswith(".scale") for name in trained)


def test_nothing_matched_is_an_error():
    with pytest.raises(UserError, match="no module of Llama matched"):
        replace_modules(random_model(), lambda name, _: name == "x", lambda module: module)


class Window:
    """Sliding-window attention: a token sees itself and the 5 before it. (Here a row is one document.)"""

    def __init__(self, lengths, device):
        self.seen = window(lengths[0])

    def attend(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, self.seen, enable_gqa=True).transpose(1, 2)


def window(tokens):
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (distance >= 0) & (distance < 6)


class SmoothedHead(LMHead):
    """A loss of its own: cross entropy with smoothed labels."""

    def __init__(self, head):
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight

    def forward(self, x, labels=None):
        if labels is None:
            return super().forward(x)
        logits = F.linear(x.flatten(0, 1)[labels.rows], self.weight)
        return F.cross_entropy(logits, labels.ids, reduction="sum", label_smoothing=0.1)


DOCUMENTS = documents_of([20] * 8)


def two_steps(mesh, folder, scales):
    """(loss, gradient norm) of two steps of a fork's model, and its adapter after them."""
    fsdp = FsdpConfig(strategy="full-shard", precision="fp32")
    with torch.device("meta"):
        model = Llama(read_config(folder)).requires_grad_(False)
        replace_modules(model, lambda name, _: name.endswith(("k_proj", "v_proj", "up_proj")), Scaled)
        replace_modules(model, lambda name, _: name == "lm_head", SmoothedHead)
    model.attention = Window
    set_dtypes(model, fsdp)
    shard(model, mesh, fsdp)
    materialise(model, "cpu")
    initialise(model, 0, loaded=load_weights(model, folder))
    assert all((value == 1).all() for name, value in whole(model).items() if name.endswith("scale"))
    for name, value in scales.items():
        parameter = model.get_parameter(name)
        local(parameter).data.copy_(local(like(value, parameter)))
    optimizer = make_optimizer(model.parameters(), OptimConfig(lr=0.01))
    packed, numbers = pad(DOCUMENTS, 20), []
    for step in range(2):  # 4 documents each: 2 micro-batches of one on either rank
        mine = [4 * step + dist.get_rank(), 4 * step + 2 + dist.get_rank()]
        loss, norm = train_step(model, optimizer, [collate(packed, [number], 0, "cpu") for number in mine])
        numbers += [loss.item(), norm.item()]
    return numbers, {name: value for name, value in whole(model).items() if name in scales}


def test_an_adapter_an_attention_and_a_loss_of_ones_own_train_sharded(tiny_folder):
    """Beside transformers with a mask, peft's (IA)^3 and PyTorch's AdamW in one process."""
    config = IA3Config(target_modules=["k_proj", "v_proj", "up_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    reference = get_peft_model(hf_reference(random_model()), config)
    theirs = {
        name.removeprefix("base_model.model.").replace("ia3_l.default", "scale"): parameter
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    torch.manual_seed(1)
    scales = {name: 1 + 0.3 * torch.randn(len(parameter)) for name, parameter in theirs.items()}
    for name, parameter in theirs.items():
        parameter.data.copy_(scales[name].view_as(parameter))
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.01, weight_decay=0.0)
    mask = torch.where(window(20), 0.0, -torch.inf)[None, None]
    tokens, trained = (torch.from_numpy(part).view(8, 20) for part in (DOCUMENTS.tokens, DOCUMENTS.trained))
    expected = []
    for rows in (slice(0, 4), slice(4, 8)):
        logits = reference(tokens[rows].long(), attention_mask=mask.expand(4, -1, -1, -1)).logits[:, :-1]
        labels = tokens[rows, 1:].long().where(trained[rows, 1:], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([parameter.grad.flatten() for parameter in theirs.values()]).norm()
        optimizer.step()
        expected += [loss.item(), norm.item()]
    for numbers, after in run_ranks(two_steps, 2, tiny_folder, scales):
        assert numbers == pytest.approx(expected, rel=1e-4) and len(after) == 9
        for name, value in after.items():
            torch.testing.assert_close(value, theirs[name].detach().flatten(), rtol=1e-4, atol=1e-5, msg=name)
