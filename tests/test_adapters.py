"""PEFT's adapter folders that are out of the ordinary: tied adapters, initialisations, copies of the base's weights."""

import json

import pytest
import torch
from conftest import random_model, run_ranks, save_folder
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_model import hf_reference
from transformers import LlamaForCausalLM

from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.adapters.merge import merge_adapter
from minillama.adapters.peft import (
    PEFT_PREFIX,
    continue_adapter,
    copies_of_base,
    load_adapter,
    load_adapter_weights,
    peft_name,
    read_adapter_config,
    save_adapter,
)
from minillama.errors import UserError
from minillama.formats.hf import adapter_parameters, from_pretrained, load_weights
from minillama.model.llama import Llama
from minillama.parallel.initialise import materialise
from minillama.parallel.sharding import FsdpConfig, shard


@pytest.mark.parametrize(
    "targets", [["q_proj", "embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"], ["q_proj"]]
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying", "ignore:Setting `save_embedding_layers`")
def test_pefts_tied_adapters(tmp_path, targets, tied):
    base = save_folder(random_model(tie_word_embeddings=tied), tmp_path / "base", tie_word_embeddings=tied)
    settings = {"target_modules": targets, "ensure_weight_tying": True, "init_lora_weights": False}
    reference = get_peft_model(LlamaForCausalLM.from_pretrained(base), PeftConfig(r=4, **settings))
    reference.save_pretrained(tmp_path / "a")
    tokens = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        expected = reference(tokens).logits
        logits = load_adapter(from_pretrained(base), tmp_path / "a")(tokens)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        merge_adapter(base, tmp_path / "a", tmp_path / "merged")
        logits = from_pretrained(tmp_path / "merged")(tokens)
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    both = {"lm_head", "model.embed_tokens"} <= set(read_adapter_config(tmp_path / "a").targets)
    assert both == ((tied and targets != ["q_proj"]) or targets == ["embed_tokens", "lm_head"])
    if both:
        with pytest.raises(UserError, match="ensure_weight_tying, by which the head and the embedding learn the same"):
            continue_adapter(LoraConfig(), tmp_path / "a")
    else:
        assert continue_adapter(LoraConfig(), tmp_path / "a").rank == 4


@pytest.mark.parametrize("init", ["orthogonal", "eva", "gaussian"])
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'", "ignore:lora with eva")
def test_initialisations_that_leave_the_base_alone(tmp_path, init):
    reference = get_peft_model(
        hf_reference(random_model()), PeftConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    )
    for name, parameter in reference.named_parameters():
        if "lora_B" in name and init != "orthogonal":
            torch.nn.init.normal_(parameter)
    reference.save_pretrained(tmp_path)
    tokens = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        expected, logits = reference(tokens).logits, load_adapter(random_model(), tmp_path)(tokens)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern", "ignore:The following")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_ranks_and_alphas_of_single_layers(tmp_path, more):
    """rank_pattern and alpha_pattern, as EVA leaves them; of two keys that match, PEFT takes the first."""
    base = save_folder(random_model(), tmp_path / "base")
    targets = ["all-linear"] if "use_dora" in more else ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    ranks = {r"0\.self_attn\.q_proj": 2, r"[01]\.self_attn\.q_proj": 5, "down_proj|embed_tokens": 3}
    alphas = {".*layers.1.*": 4.5, "lm_head": 2, "proj": 100, "q_proj": 20}
    config = PeftConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets if len(targets) > 1 else targets[0],
        rank_pattern=ranks,
        alpha_pattern=alphas,
        task_type="CAUSAL_LM",
        **more,
    )
    reference = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for parameter in reference.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, mean=float(parameter.ndim == 1), std=0.1)
    reference.save_pretrained(tmp_path / "a")
    found = continue_adapter(LoraConfig(), tmp_path / "a")
    by_layer = [found.of(f"model.layers.{i}.self_attn.q_proj") for i in range(3)]
    assert [(one.rank, one.alpha) for one in by_layer] == [(2, 20), (5, 4.5), (4, 20)]

    tokens = torch.randint(0, 512, (2, 30))
    expected, model = reference(tokens).logits, load_adapter(from_pretrained(base), tmp_path / "a")
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
    logits = model(tokens)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    expected.logsumexp(-1).sum().backward()
    logits.logsumexp(-1).sum().backward()
    theirs = {
        name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"): p.grad
        for name, p in reference.named_parameters()
    }
    for name, parameter in adapter_parameters(model).items():
        grad = theirs[peft_name(name)]
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item(), msg=name)

    save_adapter(model, tmp_path / "ours", found, str(base))
    again, before = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "a"))
    assert again.keys() == before.keys() - copies_of_base(before).keys()
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "ours")
    merge_adapter(base, tmp_path / "a", tmp_path / "merged")
    with torch.no_grad():
        assert (again(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        logits = from_pretrained(tmp_path / "merged")(tokens)
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight has shape \[4, 32\], not \[2, 32\]"),
        ({"rank_pattern": {"q_proj": 0}}, "a/adapter_config.json: rank 0: must be at least 1"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern.q_proj must be a whole number, found"),
        ({"alpha_pattern": {"(q_proj": 2}}, r"a key of {'\(q_proj': 2} is no usable expression: missing \)"),
        ({"alpha_pattern": {"(.|..)+(?<!j)": 2}}, "is no usable expression: regex timed out"),
    ],
    ids=str,
)
def test_patterns_that_do_not_fit(tmp_path, change, message):
    get_peft_model(hf_reference(random_model()), PeftConfig(r=4, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "a"
    )
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_adapter(random_model(), tmp_path / "a")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_that_brings_the_embedding_along(tmp_path, tied):
    """As PEFT saves it where the vocabulary has grown: right on the base with that vocabulary, refused on others."""
    changes = {"tie_word_embeddings": tied}
    base = save_folder(random_model(**changes), tmp_path / "base", **changes)
    reference = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), PeftConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    reference.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert f"{PEFT_PREFIX}lm_head.weight" in load_file(tmp_path / "a/adapter_model.safetensors")
    tokens = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        expected = reference(tokens).logits
        logits = load_adapter(from_pretrained(base), tmp_path / "a")(tokens)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert load_adapter(from_pretrained(base, dtype=torch.bfloat16), tmp_path / "a")(tokens).isfinite().all()
        merge_adapter(base, tmp_path / "a", tmp_path / "merged")
        logits = from_pretrained(tmp_path / "merged")(tokens)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

    other = save_folder(random_model(1, **changes), tmp_path / "other", **changes)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors holds a .* that is not the base's"):
        load_adapter(from_pretrained(other), tmp_path / "a")
    with pytest.raises(UserError, match=r"the adapter holds a .* that is not the base's"):
        merge_adapter(other, tmp_path / "a", tmp_path / "wrong", any_base=True)
    assert not (tmp_path / "wrong").exists()
    small = save_folder(random_model(vocab_size=500, **changes), tmp_path / "small", vocab_size=500, **changes)
    with pytest.raises(UserError, match=r"shape \[512, 32\], and here it is \[500, 32\]: its vocabulary was changed"):
        load_adapter(from_pretrained(small), tmp_path / "a")


def copies_on_ranks(mesh, folder, adapter):
    """What loading the adapter into a sharded base says"""
    with torch.device("meta"):
        model = apply_lora(Llama(from_pretrained(folder).config), read_adapter_config(adapter))
    shard(model, mesh, FsdpConfig(strategy="full-shard", precision="fp32"))
    materialise(model, "cpu")
    load_weights(model, folder)
    try:
        load_adapter_weights(model, adapter)
    except UserError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_the_embedding_is_compared_shard_by_shard(tmp_path):
    base = save_folder(random_model(), tmp_path / "base")
    reference = get_peft_model(LlamaForCausalLM.from_pretrained(base), PeftConfig(r=4, target_modules=["q_proj"]))
    reference.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert run_ranks(copies_on_ranks, 2, base, tmp_path / "a") == [None, None]
    model = random_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[-1, -1] += 1  # in the last rank's part
    other = save_folder(model, tmp_path / "other")
    first, last = run_ranks(copies_on_ranks, 2, other, tmp_path / "a")
    assert first is None and "holds a model.embed_tokens.weight that is not the base's" in last
