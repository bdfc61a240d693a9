"""Hugging Face folders in, PEFT folders in and out."""

import json

import pytest
import torch
from conftest import TINY, random_model, save_folder
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_lora import adapted, trainable
from test_model import hf_twin

from minillama.errors import UserError
from minillama.hf import from_pretrained, load_adapter, save_adapter
from minillama.lora import LoraConfig


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_loads_what_was_saved_in_the_files_dtype(tmp_path):
    model = random_model()
    assert_same(parameters(from_pretrained(save_folder(model, tmp_path / "fp32"))), parameters(model))
    loaded = from_pretrained(save_folder(model.bfloat16(), tmp_path / "bf16"))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_loads_what_transformers_saves_in_several_files(tmp_path):
    model = random_model()
    hf_twin(model).save_pretrained(tmp_path, max_shard_size="30kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(parameters(from_pretrained(tmp_path)), parameters(model))


@pytest.mark.parametrize("head_in_file", [False, True])
def test_tied_head(tmp_path, head_in_file):
    model = random_model(tie_word_embeddings=True)
    folder = save_folder(model, tmp_path, tie_word_embeddings=True)
    if head_in_file:
        tensors = load_file(folder / "model.safetensors")
        save_file(
            tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors"
        )
    loaded = from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(parameters(loaded), parameters(model))


def test_a_tied_config_with_another_head_in_the_file_is_refused(tmp_path):
    folder = save_folder(random_model(), tmp_path, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head.weight is not the embedding"):
        from_pretrained(folder)


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("minillama.hf.READ_BYTES", 1000)  # 7 rows and a bit of a (.., 32) fp32 matrix
    model = random_model()
    assert_same(parameters(from_pretrained(save_folder(model, tmp_path))), parameters(model))


def broken(tmp_path, change):
    folder = save_folder(random_model(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_missing_unexpected_and_misshapen_are_named(tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(31)

    with pytest.raises(UserError) as error:
        from_pretrained(broken(tmp_path, change))
    message = str(error.value)
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "model.layers.3.mlp.up_proj.weight is not part of the model" in message
    assert "model.norm.weight has shape [31], the config asks for [32]" in message


def test_rope_frequencies_of_old_files_are_passed_over(tmp_path):
    folder = broken(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert_same(parameters(from_pretrained(folder)), parameters(random_model()))


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.json is missing"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(UserError, match=r"neither model.safetensors nor"):
        from_pretrained(tmp_path)
    folder = save_folder(random_model(), tmp_path / "cut")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read, it may be truncated"):
        from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "a.safetensors"}}')
    with pytest.raises(UserError, match=r"names files that are not there: a.safetensors"):
        from_pretrained(folder)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_our_adapter_and_we_read_pefts(tmp_path, rslora):
    config = LoraConfig(rank=4, alpha=8, targets=("q_proj", "down_proj"), rslora=rslora)
    model = adapted(config)
    base = str(save_folder(random_model(), tmp_path / "base"))
    save_adapter(model, tmp_path / "ours", config, base)
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["base_model_name_or_path"] == base
    tokens = torch.randint(0, 512, (2, 30))
    twin = PeftModel.from_pretrained(hf_twin(random_model()), tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    keys = [set(load_file(tmp_path / f / "adapter_model.safetensors")) for f in ("ours", "theirs")]
    assert keys[0] == keys[1] and len(keys[0]) == 12
    with torch.no_grad():
        expected = twin(tokens).logits
        for folder in ("ours", "theirs"):
            logits = load_adapter(random_model(), tmp_path / folder)(tokens)
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    config = LoraConfig(rank=4)
    save_adapter(adapted(config), tmp_path / "a", config, "base")
    with pytest.raises(UserError, match=r"layers.3.self_attn.q_proj.lora_A.weight is missing"):
        load_adapter(random_model(num_hidden_layers=4), tmp_path / "a")
    with pytest.raises(UserError, match=r"shape \[4, 32\], not \[4, 64\]"):
        load_adapter(random_model(hidden_size=64), tmp_path / "a")
    with pytest.raises(UserError, match=r"adapter folder .* does not exist"):
        load_adapter(random_model(), tmp_path / "b")
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        load_adapter(random_model(), tmp_path / "a")


def test_saving_changes_nothing_and_replaces_the_whole_folder(tmp_path):
    config = LoraConfig(rank=4)
    model = adapted(config)
    before = {name: p.clone() for name, p in trainable(model).items()}
    (tmp_path / "a").mkdir()
    for name in ("adapter_config.json", "old"):
        (tmp_path / "a" / name).touch()
    save_adapter(model, tmp_path / "a", config, "base")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert_same(before, trainable(model))
