"""LoRA against peft."""

import pytest
import torch
from conftest import random_model
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from test_model import hf_reference

from minillama.adapters.lora import LoraConfig, LoraLinear, apply_lora, merge_lora
from minillama.errors import UserError
from minillama.model.quant import apply_quantization


def adapted(config: LoraConfig, **changes):
    """A random model with random adapters (B not zero, so that everything counts), its base frozen."""
    model = random_model(**changes).requires_grad_(False)
    apply_lora(model, config)
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def peft_reference(model, config: LoraConfig, **changes):
    targets = "all-linear" if "all-linear" in config.targets else list(config.targets)
    reference = get_peft_model(
        hf_reference(random_model(**changes), **changes),
        PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            use_rslora=config.rslora,
            use_dora=config.dora,
            task_type="CAUSAL_LM",
        ),
    )
    theirs = {
        name.removeprefix("base_model.model.")
        .replace("lora_magnitude_vector.default.weight", "lora_magnitude_change")
        .replace(".default", ""): parameter
        for name, parameter in trainable(reference).items()
    }
    assert theirs.keys() == trainable(model).keys()
    for name, parameter in trainable(model).items():
        value = parameter.data
        if "magnitude" in name:  # theirs is the whole length
            value = value + model.get_parameter(name.replace("lora_magnitude_change", "weight")).norm(dim=1)
        theirs[name].data.copy_(value)
    return reference, theirs


def test_a_model_is_adapted_once():
    model = adapted(LoraConfig(rank=2))
    with pytest.raises(UserError, match="has a LoRA already"):
        apply_lora(model, LoraConfig(rank=2, targets=("all-linear",)))
    names = set(trainable(model))
    assert len(names) == 3 * 2 * 2 and not any("lora_A.lora" in name or "lora_B.lora" in name for name in names)
    assert len(trainable(apply_lora(merge_lora(model), LoraConfig(rank=2)))) == 3 * 2 * 2


EVERYWHERE = ("all-linear", "lm_head", "embed_tokens")


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({}, {}),
        ({"targets": ("all-linear",)}, {}),
        ({"targets": ("mlp.down_proj",), "rslora": True}, {}),
        ({"targets": ("q_proj", "lm_head")}, {}),
        ({"targets": ("embed_tokens",), "rslora": True}, {}),
        ({"targets": ("embed_tokens", "v_proj", "lm_head")}, {"tie_word_embeddings": True}),
        ({"targets": ("all-linear",), "dora": True}, {"attention_bias": True, "mlp_bias": True}),
        ({"dora": True, "rslora": True}, {}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_logits_and_gradients_equal_peft(config, changes):
    config = LoraConfig(**{"rank": 4, "alpha": 16, "dropout": 0.0} | config)
    model = adapted(config, **changes)
    reference, theirs = peft_reference(model, config, **changes)
    tokens = torch.randint(0, 512, (2, 40))
    ours, expected = model(tokens), reference(tokens).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    labels = torch.randint(0, 512, (2, 40)).masked_fill(torch.rand(2, 40) < 0.3, -100)
    model(tokens, labels=labels).backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for name, parameter in trainable(model).items():
        scale = theirs[name].grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5 * scale, msg=name)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_dora_with_dropout_equals_peft():
    """The same draws on both sides: nothing but the adapted layers draws, in the same order."""
    config = LoraConfig(rank=4, dropout=0.4, targets=("q_proj",), dora=True)
    model = adapted(config).train()
    reference, theirs = peft_reference(model, config)
    reference.train()
    tokens = torch.randint(0, 512, (2, 40))
    torch.manual_seed(3)
    ours = model(tokens)
    torch.manual_seed(3)
    expected = reference(tokens).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_doras_gain_is_kept_only_while_nothing_trains():
    layer = adapted(LoraConfig(rank=4, targets=("q_proj",), dora=True)).model.layers[0].self_attn.q_proj.eval()
    x = torch.randn(5, 32)
    with torch.no_grad():
        before, change = layer(x), layer.lora_magnitude_change
        assert torch.equal(layer(x), before) and layer.gain(change) is layer.gain(change)
        layer.train()
        layer.lora_magnitude_change += 1
        layer.eval()
        after = layer(x)
        weight = layer.weight.double() + layer.scale * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
        length = layer.weight.double().norm(dim=1) + layer.lora_magnitude_change.double()
        exact = x.double() @ (weight / weight.norm(dim=1, keepdim=True) * length[:, None]).T
    torch.testing.assert_close(after.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), after)
    layer(x).sum().backward()
    layer(x).sum().backward()  # no graph is kept


def test_dora_starts_as_the_base():
    model = random_model().requires_grad_(False)
    tokens = torch.randint(0, 512, (1, 20))
    before = model(tokens)
    apply_lora(model, LoraConfig(targets=("all-linear",), dora=True))
    torch.testing.assert_close(model(tokens), before, rtol=1e-5, atol=1e-5)


def test_starts_as_the_base_and_as_peft_does():
    model = random_model().requires_grad_(False)
    tokens = torch.randint(0, 512, (1, 20))
    before = model(tokens)
    apply_lora(model, LoraConfig(rank=64, targets=("all-linear",)))
    assert torch.equal(model(tokens), before)
    for name, parameter in trainable(model).items():
        if "lora_A" in name:  # U(-1/sqrt(in), 1/sqrt(in)): kaiming_uniform with a = sqrt(5)
            bound = parameter.shape[1] ** -0.5
            assert parameter.abs().max() <= bound
            torch.testing.assert_close(parameter.std().item(), bound / 3**0.5, rtol=0.1, atol=0)


def test_dropout_acts_on_the_branch_alone_and_only_in_training():
    config = LoraConfig(rank=4, dropout=0.5, targets=("q_proj",))
    layer = adapted(config).model.layers[0].self_attn.q_proj
    x = torch.randn(4000, 32)
    base = x @ layer.weight.T
    branch = layer.eval()(x) - base
    torch.testing.assert_close(
        branch, x @ (layer.lora_B.weight @ layer.lora_A.weight).T * config.scale, rtol=1e-3, atol=1e-4
    )
    torch.manual_seed(0)
    dropped = layer.train()(x) - base
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(x, 0.5)  # the same draw: inputs are dropped, and those kept doubled
    expected = kept @ (layer.lora_B.weight @ layer.lora_A.weight).T * config.scale
    torch.testing.assert_close(dropped, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(dropped, branch, atol=1e-2)


def test_adapters_are_fp32_on_a_bf16_base_and_summed_in_fp32():
    model = random_model().bfloat16().requires_grad_(False)
    apply_lora(model, LoraConfig(rank=4, dropout=0.0))
    layer = model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B.weight)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    x = torch.randn(100, 32).bfloat16()
    product = 8 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    exact = (x @ layer.weight.T).double() + x.double() @ product.T
    assert layer(x).dtype == torch.bfloat16
    # rounded once: by at most half the distance of two bf16 numbers
    half = 2.0 ** (exact.frexp().exponent - 9)
    assert ((layer(x) - exact).abs() <= half + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_layer_on_a_bf16_base_computes_as_in_fp32(dtype):
    config = LoraConfig(rank=4, dropout=0.0, targets=EVERYWHERE)
    model, exact = adapted(config).bfloat16(), adapted(config)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.to(dtype)
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 512, (2, 40))
    loss, expected = (m(tokens, labels=tokens) for m in (model, exact))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    loss.backward()
    expected.backward()
    for name, parameter in trainable(model).items():
        grad = exact.get_parameter(name).grad
        assert parameter.grad.dtype == dtype and (parameter.grad - grad).norm() < 0.1 * grad.norm(), name


@pytest.mark.parametrize(
    ("config", "changes", "tied"),
    [
        ({"targets": ("all-linear",)}, {}, False),
        ({"targets": ("all-linear",), "dora": True}, {"attention_bias": True}, False),
        ({"targets": ("all-linear",), "rslora": True}, {"tie_word_embeddings": True}, True),
        ({"targets": EVERYWHERE}, {"tie_word_embeddings": True}, False),
        ({"targets": ("embed_tokens",)}, {"tie_word_embeddings": True}, False),
        ({"targets": ("lm_head",)}, {"tie_word_embeddings": True}, False),
    ],
    ids=str,
)
def test_merge(config, changes, tied):
    model = adapted(LoraConfig(rank=4, **config), **changes)
    tokens = torch.randint(0, 512, (1, 30))
    with torch.no_grad():
        before = model(tokens)
        merge_lora(model)
        assert (model(tokens) - before).abs().max() <= 1e-5 * before.abs().max()
    names = set(dict(random_model(**changes | {"tie_word_embeddings": tied}).named_parameters()))
    assert set(dict(model.named_parameters())) == names and model.config.tie_word_embeddings == tied
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_parameter_counts_of_the_reference():
    from minillama.model.config import LlamaConfig
    from minillama.model.llama import Llama

    shapes = {  # Llama 3.2 1B, 3.1 8B: r 8 on q and v
        851_968: dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64),
        3_407_872: dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32),
    }
    for count, shape in shapes.items():
        with torch.device("meta"):
            model = Llama(LlamaConfig(vocab_size=128256, num_key_value_heads=8, **shape)).requires_grad_(False)
            apply_lora(model, LoraConfig())
        assert sum(p.numel() for p in trainable(model).values()) == count


@pytest.mark.parametrize("target", ["w_proj", "roj", "norm"])
def test_a_target_that_matches_nothing_is_named(target):
    with pytest.raises(UserError, match=f'"{target}" matches no layer.*q_proj'):
        apply_lora(random_model(), LoraConfig(targets=("q_proj", target)))


@pytest.mark.parametrize("target", ["lm_head", "model.embed_tokens"])
def test_dora_at_the_ends_of_the_model_is_refused(target):
    with pytest.raises(UserError, match=f"--lora.dora with {target} among --lora.targets is not supported"):
        LoraConfig(targets=("q_proj", target), dora=True)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 2**24 + 1}, "rank 16777217"),
        ({"ranks": {"lm_head": 0}}, "rank 0"),
        ({"alpha": float("inf")}, "alpha inf"),
        ({"alphas": {"lm_head": float("nan")}}, "alpha nan"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_impossible_settings(wrong, named):
    LoraConfig(rank=1, dropout=0.0)
    with pytest.raises(UserError, match=f"--lora.{named}"):
        LoraConfig(**wrong)


def test_ranks_and_alphas_of_single_layers():
    name = "model.layers.1.self_attn.q_proj"
    model = apply_lora(random_model(), LoraConfig(rank=4, alpha=8, ranks={name: 2}, alphas={name: 5.0}))
    found = {n: (m.lora_A.out_features, m.scale) for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert len(found) == 6 and all(value == ((2, 2.5) if n == name else (4, 2.0)) for n, value in found.items())


def test_only_what_matches_is_replaced():
    model = apply_lora(random_model(), LoraConfig(targets=("layers.1.self_attn.q_proj", "o_proj")))
    found = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert found == [
        f"model.layers.{i}.self_attn.{n}" for i, n in [(0, "o_proj"), (1, "q_proj"), (1, "o_proj"), (2, "o_proj")]
    ]


def test_more_to_train_than_there_is_to_adapt(capsys):
    """Of a quantised layer the weights count, not its bytes: here 64 x 64 of them, in 34 bytes a row."""
    wide = {"hidden_size": 64, "num_key_value_heads": 4}
    for rank, warned in ((32, 0), (33, 1)):
        for quantize in (lambda model: model, lambda model: apply_quantization(model, "nf4")):
            apply_lora(quantize(random_model(**wide)).requires_grad_(False), LoraConfig(rank, targets=("q_proj",)))
            assert capsys.readouterr().err.count("and its layers themselves have 12,288: give less") == warned
