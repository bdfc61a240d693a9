"""The model against transformers, in fp32."""

import itertools
import json
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, random_model
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minillama.errors import UserError
from minillama.model.config import LlamaConfig
from minillama.model.elementwise import rms_norm, rms_norm_plain, swiglu, swiglu_plain
from minillama.model.llama import Llama
from minillama.model.rope import rope_frequencies, rope_table, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "kv heads not given": {"num_key_value_heads": None},
    "tied": {"tie_word_embeddings": True},
    "llama3 scaling 8": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama3 scaling 32": {
        "rope_scaling": LLAMA3 | {"factor": 32.0},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "head_dim": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def hf_reference(model: Llama, **changes) -> LlamaForCausalLM:
    reference = LlamaForCausalLM(HFConfig(**(TINY | changes), attn_implementation="eager")).eval()
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=True)
    assert not missing and not unexpected
    return reference


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers(changes):
    model = random_model(**changes)
    tokens = torch.randint(0, 512, (2, 200))
    with torch.no_grad():
        ours, theirs = model(tokens), hf_reference(model, **changes)(tokens).logits
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        torch.testing.assert_close(model(tokens, keep=tokens > 400), ours[tokens > 400], rtol=1e-5, atol=1e-5)


def test_gradients_equal_transformers():
    model = random_model()
    reference = hf_reference(model)
    tokens = torch.randint(0, 512, (2, 50))
    reference(tokens, labels=tokens).loss.backward()
    labels = torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), dim=1)
    (model(tokens, labels=labels) / (labels != -100).sum()).backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_documents_do_not_see_each_other():
    model = random_model()
    lengths = [[7, 1, 12], [20]]
    tokens = torch.randint(0, 512, (2, 20))
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        packed = model(tokens, positions=positions, document_ids=ids)
        alone = torch.stack(
            [torch.cat([model(d[None])[0] for d in t.split(n)]) for t, n in zip(tokens, lengths, strict=True)]
        )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_rope_is_fp32_whatever_the_model_is_cast_to():
    model = random_model().to(torch.bfloat16)
    positions = torch.tensor([[0, 1023, 4095]])
    cos, sin = rope_table(model.config, positions)
    exact = positions.double()[..., None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos[0, :, 0].double(), exact[0].cos(), rtol=0, atol=5e-4)  # fp32 angles up to 4095
    assert not list(model.buffers())
    x = torch.randn(1, 3, 2, 8)
    assert rotate(x.bfloat16(), (cos, sin)).dtype == torch.bfloat16


def test_llama3_frequencies_keep_slow_and_mix():
    config = LlamaConfig.from_dict(TINY | {"rope_scaling": LLAMA3, "head_dim": 64, "rope_theta": 500000.0})
    plain = rope_frequencies(LlamaConfig.from_dict(TINY | {"head_dim": 64, "rope_theta": 500000.0}))
    ratio = rope_frequencies(config) / plain
    turns = 64 * plain / (2 * torch.pi)
    assert torch.equal(ratio[turns >= 4], torch.ones_like(ratio[turns >= 4]))
    torch.testing.assert_close(ratio[turns <= 1], torch.full_like(ratio[turns <= 1], 1 / 8))
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) and ((between > 1 / 8) & (between < 1)).all()


def test_config_of_transformers_5_reads_the_same():
    new = {k: v for k, v in TINY.items() if k != "rope_theta"} | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    old = TINY | {
        "rope_theta": 5e5,
        "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()},
    }
    assert LlamaConfig.from_dict(new) == LlamaConfig.from_dict(old)


def test_rope_settings_that_disagree_are_read_as_transformers_reads_them():
    short = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    linear = {"type": "linear", "factor": 4.0}
    named = [
        None,
        {},
        {"rope_type": "default"},
        {"rope_type": "default", "rope_theta": 5e5},
        LLAMA3 | {"rope_theta": 7e4},
    ]
    scaling = [None, {}, linear, linear | {"rope_type": "default"}, linear | {"rope_theta": 9e3}, LLAMA3, short]
    for both in itertools.product(
        named, scaling, [{}, {"rope_theta": 2e4}], [{}, {"original_max_position_embeddings": 32}]
    ):
        settings = {"rope_parameters": both[0], "rope_scaling": both[1]}
        given = TINY | {key: value for key, value in settings.items() if value is not None} | both[2] | both[3]
        given = given if both[2] else {key: value for key, value in given.items() if key != "rope_theta"}
        theirs = HFConfig(**json.loads(json.dumps(given)))
        frequencies = LlamaRotaryEmbedding(theirs).inv_freq
        torch.testing.assert_close(rope_frequencies(LlamaConfig.from_dict(given)), frequencies, msg=str(given))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": None}, "architecture"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"vocab_size": 2**24 + 1}, "no Llama is that large"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0"),
        ({"rope_scaling": 3}, "which are no object"),
        ({"rope_scaling": {"factor": 2.0}}, "has a factor but no rope_type"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_unsupported_configs_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        LlamaConfig.from_dict(TINY | changes)


def test_the_largest_sizes_and_the_defaults_of_transformers():
    assert LlamaConfig.from_dict(TINY | {"vocab_size": 2**24}).vocab_size == 2**24
    theirs = HFConfig()
    for name, value in asdict(LlamaConfig()).items():
        if not name.startswith("rope"):
            assert value == getattr(theirs, name), name
    torch.testing.assert_close(rope_frequencies(LlamaConfig()), LlamaRotaryEmbedding(theirs).inv_freq)


def test_tied_head_is_one_parameter():
    model = random_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("norm, activation", [(rms_norm, swiglu), (rms_norm_plain, swiglu_plain)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_feed_forward_beside_their_formulas_in_float64(dtype, norm, activation):
    torch.manual_seed(0)
    x, gate, up = (torch.randn(2, 7, 24).to(dtype).requires_grad_() for _ in range(3))
    weight = torch.randn(24).to(dtype).requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, gate, up)]
    normed = exact[1] * exact[0] / (exact[0].square().mean(-1, keepdim=True) + 1e-5).sqrt()
    product = exact[2] / (1 + (-exact[2]).exp()) * exact[3]
    ours = norm(x, weight, 1e-5), activation(gate, up)
    weights = torch.randn(2, 2, 7, 24).to(dtype)
    (ours[0] * weights[0] + ours[1] * weights[1]).sum().backward()
    (normed * weights[0].double() + product * weights[1].double()).sum().backward()
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-5}
    for found, expected in zip(ours, (normed, product), strict=True):
        torch.testing.assert_close(found.double(), expected, **near)
    for found, expected in zip((x, weight, gate, up), exact, strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, **near)


@pytest.mark.parametrize("function", [lambda x: rms_norm(x, torch.ones(8), 1e-5), lambda x: swiglu(x, 2 * x)])
def test_a_second_derivative_is_an_error_not_a_wrong_number(function):
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(function(x).sum(), x, create_graph=True)


def test_lengths_are_document_ids_that_need_no_reading():
    model, tokens = random_model(), torch.randint(0, 512, (2, 20))
    ids = torch.tensor([[0] * 7 + [1] * 13, [1] * 20])
    with torch.no_grad():
        expected = model(tokens, document_ids=ids)
        assert torch.equal(model(tokens, lengths=[7, 13, 20]), expected)
        assert torch.equal(model(tokens, lengths=(7, 13, 20)), expected)
        assert not torch.equal(model(tokens), expected)
        for wrong in ([], [20], [7, 13], [7, 13, 21], [7, 20, 13], [40]):
            with pytest.raises(UserError, match="lengths: those of documents that fill 2 rows of 20 tokens"):
                model(tokens, lengths=wrong)
