"""LoRA against peft."""

import pytest
import torch
from conftest import random_model
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from test_model import hf_twin

from minillama.errors import UserError
from minillama.lora import LoraConfig, LoraLinear, apply_lora, merge_lora


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


def peft_twin(model, config: LoraConfig, **changes):
    targets = "all-linear" if "all-linear" in config.targets else list(config.targets)
    plain = random_model(**changes)
    twin = get_peft_model(
        hf_twin(plain, **changes),
        PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=targets,
            use_rslora=config.rslora,
            task_type="CAUSAL_LM",
        ),
    )
    theirs = {n.replace(".default.", ".").removeprefix("base_model.model."): p for n, p in trainable(twin).items()}
    assert theirs.keys() == trainable(model).keys()
    for name, parameter in trainable(model).items():
        theirs[name].data.copy_(parameter.data)
    return twin, theirs


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",), ("mlp.down_proj",)], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_and_gradients_equal_peft(targets, rslora):
    config = LoraConfig(rank=4, alpha=16, dropout=0.0, targets=targets, rslora=rslora)
    model = adapted(config)
    twin, theirs = peft_twin(model, config)
    tokens = torch.randint(0, 512, (2, 40))
    ours, expected = model(tokens), twin(tokens).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


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
    x = torch.randn(5, 32).bfloat16()
    exact = (x @ layer.weight.T).float() + (x.float() @ layer.lora_A.weight.T * 8) @ layer.lora_B.weight.T
    assert (
        torch.equal(layer(x), exact.bfloat16())
        or (layer(x) - exact.bfloat16()).abs().max() <= 2**-7 * exact.abs().max()
    )
    assert layer(x).dtype == torch.bfloat16


def test_merge():
    config = LoraConfig(rank=4, targets=("all-linear",))
    model = adapted(config)
    tokens = torch.randint(0, 512, (1, 30))
    with torch.no_grad():
        before = model(tokens)
        names = set(dict(random_model().named_parameters()))
        merge_lora(model)
        assert set(dict(model.named_parameters())) == names
        torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)


def test_parameter_counts_of_the_reference():
    from minillama.model import Llama, LlamaConfig

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
    with pytest.raises(UserError, match=f'"{target}" matches no linear layer.*q_proj'):
        apply_lora(random_model(), LoraConfig(targets=("q_proj", target)))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_the_ends_of_the_model_are_refused(target):
    with pytest.raises(UserError, match=f'LoRA on "{target}" is not supported'):
        apply_lora(random_model(), LoraConfig(targets=(target,)))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}, {"targets": ()}])
def test_impossible_settings(wrong):
    with pytest.raises(UserError, match=f"--lora.{next(iter(wrong))}"):
        LoraConfig(**wrong)


def test_only_what_matches_is_replaced():
    model = apply_lora(random_model(), LoraConfig(targets=("layers.1.self_attn.q_proj", "o_proj")))
    found = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert found == [
        f"model.layers.{i}.self_attn.{n}" for i, n in [(0, "o_proj"), (1, "q_proj"), (1, "o_proj"), (2, "o_proj")]
    ]
