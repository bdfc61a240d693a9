"""llama-adapter against peft's AdaptionPrompt."""

import pytest
import torch
from conftest import random_model
from peft import AdaptionPromptConfig, get_peft_model
from test_lora import trainable
from test_model import hf_reference

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, LoraLinear, apply_lora
from minillama.errors import UserError
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama


def adapted(config: LlamaAdapterConfig, **changes):
    """A random model with random prompts and gates (open, so that everything counts), its base frozen."""
    model = apply_llama_adapter(random_model(**changes).requires_grad_(False), config)
    randomise(model)
    return model


def randomise(model):
    torch.manual_seed(1)
    for name, parameter in trainable(model).items():
        torch.nn.init.normal_(parameter, std=0.1 if "lora" in name else 1.0)


def peft_reference(model, config: LlamaAdapterConfig, **changes):
    reference = get_peft_model(
        hf_reference(random_model(**changes), **changes),
        AdaptionPromptConfig(
            adapter_len=config.prompt_len,
            adapter_layers=min(config.layers, model.config.num_hidden_layers),
            task_type="CAUSAL_LM",
        ),
    )
    theirs = {name.removeprefix("base_model.model."): p for name, p in trainable(reference).items()}
    assert theirs.keys() == trainable(model).keys()
    for name, parameter in trainable(model).items():
        theirs[name].data.copy_(parameter.data.view_as(theirs[name]))
    return reference, theirs


@pytest.mark.parametrize("layers", [2, 30])
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4}, {"attention_bias": True}], ids=["gqa", "mha", "biases"]
)
def test_logits_and_gradients_equal_peft(changes, layers):
    config = LlamaAdapterConfig(prompt_len=7, layers=layers)
    model = adapted(config, **changes)
    assert len(trainable(model)) == 2 * min(layers, 3)
    assert all(name.split(".")[2] in "012"[-layers:] for name in trainable(model))
    reference, theirs = peft_reference(model, config, **changes)
    tokens = torch.randint(0, 512, (2, 40))
    ours, expected = model(tokens), reference(tokens).logits
    with torch.no_grad():
        base = random_model(**changes)(tokens)
    assert (base - expected).abs().max() > 0.1 * expected.abs().max()
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    for name, parameter in trainable(model).items():
        grad = theirs[name].grad.view_as(parameter)
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4, msg=name)


def test_starts_as_the_base_and_only_the_gate_has_a_gradient_until_it_opens():
    model = random_model().requires_grad_(False)
    tokens = torch.randint(0, 512, (2, 20))
    before = model(tokens)
    apply_llama_adapter(model, LlamaAdapterConfig(prompt_len=64))
    parameters = trainable(model)
    assert len(parameters) == 6
    for name, parameter in parameters.items():
        if name.endswith("prompt"):
            torch.testing.assert_close(parameter.std().item(), 1.0, rtol=0.05, atol=0)
            torch.testing.assert_close(parameter.mean().item(), 0.0, rtol=0, atol=0.1)
    after = model(tokens)
    assert torch.equal(after, before)
    after.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith(("adaption_prompt", "adaption_gate")), name
    for name, parameter in parameters.items():
        assert parameter.grad.any() == name.endswith("gate"), name
        parameter.data -= 0.01 * parameter.grad
    model(tokens).logsumexp(-1).sum().backward()
    assert all(parameter.grad.any() for parameter in parameters.values())


def test_packed_documents_are_as_one_by_one():
    model = adapted(LlamaAdapterConfig(prompt_len=3))
    lengths = [[7, 1, 12], [20]]
    tokens = torch.randint(0, 512, (2, 20))
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        packed = model(tokens, positions=positions, document_ids=ids)
        alone = [torch.cat([model(d[None])[0] for d in t.split(n)]) for t, n in zip(tokens, lengths, strict=True)]
    torch.testing.assert_close(packed, torch.stack(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "shape"),
    [  # Llama 3.1 8B as llama-recipes logs it; 3.2 1B has but 16 layers
        (1_228_830, dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)),
        (16 * (10 * 2048 + 1), dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32)),
    ],
)
def test_parameter_counts(count, shape):
    with torch.device("meta"):
        model = Llama(LlamaConfig(vocab_size=128256, num_key_value_heads=8, **shape)).requires_grad_(False)
        names = set(dict(model.named_parameters()))
        apply_llama_adapter(model, LlamaAdapterConfig())
    assert sum(p.numel() for p in trainable(model).values()) == count
    assert names < set(dict(model.named_parameters())) and all(p.is_meta for p in model.parameters())


def test_composes_with_lora_in_either_order():
    adapter, lora = LlamaAdapterConfig(prompt_len=5, layers=2), LoraConfig(rank=4, targets=("all-linear",))
    models = []
    for order in (0, 1):
        model = random_model().requires_grad_(False)
        if order == 0:
            apply_lora(apply_llama_adapter(model, adapter), lora)
        else:
            apply_llama_adapter(apply_lora(model, lora), adapter)
        assert len(trainable(model)) == 3 * 7 * 2 + 2 * 2
        assert all(isinstance(getattr(model.model.layers[2].self_attn, f"{n}_proj"), LoraLinear) for n in "qkvo")
        models.append(model)
    randomise(models[0])
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(0, 512, (2, 20))
    logits = [model(tokens) for model in models]
    assert torch.equal(*logits)
    logits[0].logsumexp(-1).sum().backward()
    assert all(parameter.grad.any() for parameter in trainable(models[0]).values())


def test_fp32_parameters_on_a_bf16_base():
    config = LlamaAdapterConfig(prompt_len=5)
    exact = adapted(config)
    model = apply_llama_adapter(random_model().bfloat16().requires_grad_(False), config)
    for name, parameter in trainable(model).items():
        assert parameter.dtype == torch.float32
        parameter.data.copy_(trainable(exact)[name])
    tokens = torch.randint(0, 512, (2, 20))
    ours, expected = model(tokens), exact(tokens)
    assert ours.dtype == torch.bfloat16
    reference = hf_reference(random_model()).bfloat16()  # what rounding costs a plain model
    cost = (reference(tokens).logits - hf_reference(random_model())(tokens).logits).abs().max()
    assert (ours - expected).abs().max() <= 2 * cost


def test_what_peft_cannot_represent_is_refused():
    with pytest.raises(UserError, match=r"num_attention_heads \* head_dim = 96, hidden_size = 32"):
        apply_llama_adapter(random_model(head_dim=24), LlamaAdapterConfig())
    model = adapted(LlamaAdapterConfig(layers=1))
    with pytest.raises(UserError, match="has a llama-adapter already"):
        apply_llama_adapter(model, LlamaAdapterConfig(layers=1))


@pytest.mark.parametrize(("wrong", "flag"), [({"prompt_len": 0}, "prompt-len 0"), ({"layers": 0}, "layers 0")])
def test_impossible_settings(wrong, flag):
    with pytest.raises(UserError, match=f"--adapter.{flag}: must be at least 1"):
        LlamaAdapterConfig(**wrong)
