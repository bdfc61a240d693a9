"""Direct preference optimization: its losses against their formulas in float64, a step against a naive one of two models."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model

from minillama.adapters.lora import LoraConfig, apply_lora, lora_off
from minillama.data.batch import collate
from minillama.data.documents import Documents
from minillama.data.packing import pack, pad
from minillama.errors import UserError
from minillama.training.dpo import (
    DpoConfig,
    DpoLoss,
    FrozenWeights,
    answer_sums,
    log_probabilities,
    preference_losses,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


FORMULAS = {
    "sigmoid": lambda h, beta, e: -(1 - e) * math.log(sigmoid(beta * h)) - e * math.log(sigmoid(-beta * h)),
    "hinge": lambda h, beta, e: max(0.0, 1 - beta * h),
    "ipo": lambda h, beta, e: (h - 1 / (2 * beta)) ** 2,
    "simpo": lambda h, beta, e: -math.log(sigmoid(beta * h - 0.5)),
}


@pytest.mark.parametrize(
    ("loss", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0), ("simpo", 0.0)]
)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_losses_of_pairs(loss, smoothing, beta):
    config = DpoConfig(beta=beta, loss=loss, label_smoothing=smoothing)
    chosen, rejected = torch.tensor([0.0, 3.0, -7.0, 0.1, 40.0]), torch.tensor([0.0, -9.0, 5.0, 0.2, 1.0])
    expected = [FORMULAS[loss](h, beta, smoothing) for h in (chosen.double() - rejected.double()).tolist()]
    losses = preference_losses(chosen, rejected, config)
    torch.testing.assert_close(losses.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


def test_a_far_wrong_pair_has_a_finite_loss():
    far = torch.tensor([-1e4]).requires_grad_()
    loss = preference_losses(far, torch.tensor([1e4]), DpoConfig())
    loss.backward()
    assert loss.item() == pytest.approx(2000) and far.grad.item() == pytest.approx(-0.1)


def test_sums_over_answers():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = answer_sums(values, torch.tensor([1, 0, 3]))
    assert sums.tolist() == [1, 0, 14]
    (sums * torch.tensor([1.0, 5.0, 3.0])).sum().backward()
    assert values.grad.tolist() == [1, 3, 3, 3]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"beta": 0.0}, "--dpo.beta 0.0"),
        ({"label_smoothing": 0.5}, "--dpo.label-smoothing 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "is for --dpo.loss sigmoid, not for ipo"),
        ({"gamma": 1.0}, "--dpo.gamma is for --dpo.loss simpo, not for sigmoid"),
        ({"loss": "simpo", "precompute": True}, "--dpo.precompute is of a reference, and --dpo.loss simpo has none"),
    ],
)
def test_impossible_flags(flags, problem):
    with pytest.raises(UserError, match=problem):
        DpoConfig(**flags)


def pairs(count=6, seed=0):
    """Documents: of each pair one prompt with two answers."""
    random = np.random.default_rng(seed)
    tokens, trained, lengths = [], [], []
    for _ in range(count):
        prompt = random.integers(0, 512, random.integers(1, 9))
        for answer in (random.integers(0, 512, random.integers(1, 12)) for _ in range(2)):
            tokens += [prompt, answer]
            trained += [np.zeros(len(prompt), bool), np.ones(len(answer), bool)]
            lengths.append(len(prompt) + len(answer))
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return Documents(np.concatenate(tokens).astype(np.int32), np.concatenate(trained), offsets, per_row=2)


def naive(model, reference, documents, config):
    """One conversation at a time, whole logits, float64: loss of all pairs, and what is told of them."""

    def logps(of, i):
        tokens, trained = documents[i]
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        found = of(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        return found[torch.from_numpy(trained[1:])]

    losses, told = [], []
    for i in range(0, len(documents), 2):
        ours = [logps(model, i + k) for k in (0, 1)]
        with torch.no_grad():
            theirs = [logps(reference, i + k) if reference else torch.zeros_like(ours[k]) for k in (0, 1)]
        by_length = config.normalize_length or config.loss == "simpo"
        ratios = [(a - b).mean() if by_length else (a - b).sum() for a, b in zip(ours, theirs, strict=True)]
        h = ratios[0] - ratios[1]
        losses.append(
            {
                "sigmoid": -(1 - config.label_smoothing) * torch.log(torch.sigmoid(config.beta * h))
                - config.label_smoothing * torch.log(torch.sigmoid(-config.beta * h)),
                "hinge": (1 - config.beta * h).clamp(min=0),
                "ipo": (h - 0.5 / config.beta) ** 2,
                "simpo": -torch.log(torch.sigmoid(config.beta * h - config.gamma)),
            }[config.loss]
        )
        kl = sum(((a - b).exp() - 1 - (a - b)).sum() for a, b in zip(ours, theirs, strict=True)) / 2
        told.append([config.beta * h.item(), float(h > 0), ours[0].sum().item(), ours[1].sum().item(), kl.item()])
    return torch.stack(losses).mean(), dict(zip(DpoLoss.names[1:], np.mean(told, 0), strict=True))


def lora_model(targets=("q_proj", "v_proj", "lm_head"), **changes):
    model = random_model(**changes).requires_grad_(False)
    apply_lora(model, LoraConfig(rank=4, targets=targets, dropout=0.0))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    "config",
    [
        DpoConfig(),
        DpoConfig(label_smoothing=0.2, beta=0.3),
        DpoConfig(loss="hinge"),
        DpoConfig(loss="ipo", normalize_length=True),
        DpoConfig(loss="simpo", beta=2.0, gamma=0.8),
    ],
)
@pytest.mark.parametrize("kind", ["full", "lora", "lora from"])
def test_loss_and_gradients_are_those_of_two_models_in_float64(kind, config):
    documents = pairs()
    if kind == "full":
        model = random_model()
        exact_reference = copy.deepcopy(model).double()
        as_reference = FrozenWeights(model)
    elif kind == "lora":
        model = lora_model()
        exact_reference, as_reference = random_model().double(), lora_off
    else:
        model = lora_model()
        exact_reference, as_reference = copy.deepcopy(model).double(), FrozenWeights(model)
    if kind != "lora":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn_like(parameter)
    exact = copy.deepcopy(model).double()
    if not config.has_reference:
        exact_reference, as_reference = None, pytest.fail  # there is no forward of one
    expected, told = naive(exact, exact_reference, documents, config)
    expected.backward()

    packed = pack(documents, 64, 0)
    loss = DpoLoss(config, as_reference, "cpu")
    for p in range(len(packed)):
        batch = collate(packed, [p], 0, "cpu")
        (loss(model, batch) / 6).backward()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all((model.get_parameter(name).grad is None) == (name not in names) for name, _ in model.named_parameters())
    for name in names:
        torch.testing.assert_close(
            model.get_parameter(name).grad.double(), exact.get_parameter(name).grad, rtol=1e-4, atol=1e-5
        )
    assert ("kl" in loss.names) == config.has_reference
    expected_told = [told[name] for name in loss.names[1:]]
    np.testing.assert_allclose((loss.sums[1:] / 6).numpy(), expected_told, rtol=1e-5, atol=1e-5)
    total = sum(loss(model, collate(packed, [p], 0, "cpu")) for p in range(len(packed))) / 6
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_reference", ["off", "copy", "precomputed"])
def test_packed_is_padded_and_a_batch_of_no_pair_is_nothing(as_reference):
    model, documents = lora_model(), pairs()
    within = FrozenWeights(model) if as_reference == "copy" else lora_off
    reference = None
    if as_reference == "precomputed":
        reference = np.full(len(documents.tokens), np.nan, np.float32)
        whole = collate(pad(documents, 64), range(6), 0, "cpu")
        with torch.no_grad(), lora_off(model):
            reference[documents.trained] = log_probabilities(model, whole)
        within = nullcontext
    found = []
    for packed in (pack(documents, 64, 0), pad(documents, 64)):
        packed = replace(packed, reference=reference)
        loss = DpoLoss(DpoConfig(), within, "cpu")
        batch = collate(packed, range(len(packed)), 0, "cpu")
        assert loss.count(batch) == 6 and loss.count(collate(packed, [], 0, "cpu")) == 0
        nothing = loss(model, collate(packed, [], 0, "cpu"))
        assert nothing.item() == 0 and nothing.requires_grad
        found.append(loss(model, batch))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
