"""Hugging Face folders in, PEFT folders in and out."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import TINY, random_model, run_ranks, save_folder
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_llama_adapter import adapted as prompted
from test_llama_adapter import peft_reference as prompted_reference
from test_lora import adapted, trainable
from test_model import hf_reference

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora, merge_lora
from minillama.adapters.peft import load_adapter, load_adapter_weights, peft_config, save_adapter, vllm_refusals
from minillama.errors import UserError
from minillama.formats.hf import (
    INDEX,
    SafetensorsWeights,
    from_pretrained,
    load_weights,
    read_config,
    weights_fingerprint,
)
from minillama.formats.hf_export import save_pretrained
from minillama.model.llama import Llama
from minillama.parallel.initialise import materialise
from minillama.parallel.sharding import FsdpConfig, like, local, set_dtypes, shard

FP32 = FsdpConfig(strategy="full-shard", precision="fp32")


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
    hf_reference(model).save_pretrained(tmp_path, max_shard_size="30kB")
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
    tensors = load_file(folder / "model.safetensors")
    longer = torch.cat((tensors["model.embed_tokens.weight"], torch.ones(1, 32)))
    save_file(tensors | {"lm_head.weight": longer}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight is not the embedding"):
        from_pretrained(folder)


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("minillama.formats.hf.READ_BYTES", 1000)  # 7 rows and a bit of a (.., 32) fp32 matrix
    model = random_model()
    assert_same(parameters(from_pretrained(save_folder(model, tmp_path))), parameters(model))


def test_what_was_read_does_not_stay_mapped(tmp_path, monkeypatch):
    """Else the resident memory that a run on CPUs reports holds the files too."""

    def mapped():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssFile:\s+(\d+)", status)[1]) / 1024

    monkeypatch.setattr("minillama.formats.hf.READ_BYTES", 2**20)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64, 2**18), "b": torch.ones(1)}, file)
    weights, whole = SafetensorsWeights({"a": file, "b": file}), torch.empty(64, 2**18)
    before = mapped()
    for row in range(64):
        whole[row : row + 1] = weights.rows("a", row, row + 1)
    assert mapped() - before < 8  # MiB, of 64
    assert whole.eq(1).all() and weights.rows("b", 0, 1) == 1


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
        tensors["model.layers.0.input_layernorm.weight"] = torch.tensor(1.0)

    with pytest.raises(UserError) as error:
        from_pretrained(broken(tmp_path, change))
    message = str(error.value)
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "model.layers.3.mlp.up_proj.weight is not part of the model" in message
    assert "model.norm.weight has shape [31], the config asks for [32]" in message
    assert "model.layers.0.input_layernorm.weight has shape [], the config asks for [32]" in message
    assert weights_fingerprint(tmp_path) != weights_fingerprint(save_folder(random_model(), tmp_path / "whole"))


def test_rope_frequencies_of_old_files_are_passed_over(tmp_path):
    folder = broken(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert_same(parameters(from_pretrained(folder)), parameters(random_model()))


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no model folder"):
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
    (folder / "model.safetensors").unlink()
    for file, message in (
        ("a.safetensors", "names files that are not there: a.safetensors"),
        ("../a.safetensors", r"names '../a.safetensors': only \*.safetensors in the folder itself are read"),
        ("/a.safetensors", "names '/a.safetensors': only"),
        ("..", "names '..': only"),
        ("config.json", "names 'config.json': only"),
        (["a.safetensors"], "names .'a.safetensors'.: only"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        with pytest.raises(UserError, match=message):
            from_pretrained(folder)


def test_a_single_file_counts_before_an_index(tmp_path, monkeypatch, capsys):
    """As in transformers: the index may be of older shards, there or not."""
    older = save_folder(random_model(1), tmp_path / "older")
    monkeypatch.setattr("minillama.formats.hf_export.MAX_FILE_BYTES", 100_000)
    save_pretrained(from_pretrained(older), tmp_path / "both", older)
    index = tmp_path / "both" / INDEX
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    assert len(shards) > 1
    assert_same(parameters(from_pretrained(tmp_path / "both")), parameters(random_model(1)))
    save_folder(random_model(2), tmp_path / "both")
    capsys.readouterr()
    for _ in range(2):
        assert_same(parameters(from_pretrained(tmp_path / "both")), parameters(random_model(2)))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
        assert_same(parameters(theirs), parameters(random_model(2)))
        for file in shards:
            (tmp_path / "both" / file).unlink(missing_ok=True)
    said = capsys.readouterr().out
    assert said.count("holds model.safetensors and model.safetensors.index.json: model.safetensors is read") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, and they are of 3 layers"),
        ({"vocab_size": 2**60}, "vocab_size 1152921504606846976: no Llama is that large"),
        ({"hidden_size": 2**24}, r"the config asks for \[512, 16777216\]"),
        ({"intermediate_size": 2**24, "vocab_size": 2**24}, r"the config asks for \[16777216, 32\]"),
        ({"num_attention_heads": 2**22, "head_dim": 64}, r"num_attention_heads \* head_dim 268435456: no Llama"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan, where a float belongs"),
        ({"model_type": "mistral"}, "architecture is not supported"),
    ],
    ids=str,
)
def test_a_config_of_another_size_is_refused_before_a_model_is_built(tmp_path, changes, message):
    folder = save_folder(random_model(), tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, 12),
        ({"rslora": True}, 12),
        ({"dora": True}, 18),
        ({"dora": True, "rslora": True, "targets": ("all-linear",)}, 63),
        ({"targets": ("embed_tokens", "q_proj", "lm_head")}, 10),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_peft_reads_our_adapter_and_we_read_pefts(tmp_path, config, count):
    config = LoraConfig(**{"rank": 4, "alpha": 8, "targets": ("q_proj", "down_proj")} | config)
    model = adapted(config)
    base = str(save_folder(random_model(), tmp_path / "base"))
    save_adapter(model, tmp_path / "ours", config, base)
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["base_model_name_or_path"] == base
    tokens = torch.randint(0, 512, (2, 30))
    reference = PeftModel.from_pretrained(hf_reference(random_model()), tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    keys = [set(load_file(tmp_path / f / "adapter_model.safetensors")) for f in ("ours", "theirs")]
    keys[1] = {key for key in keys[1] if not key.endswith(".base_layer.weight")}  # copies of the base's
    assert keys[0] == keys[1] and len(keys[0]) == count
    with torch.no_grad():
        expected = reference(tokens).logits
        assert (model(tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
        for folder in ("ours", "theirs"):
            logits = load_adapter(random_model(), tmp_path / folder)(tokens)
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": r"model\.layers\.[12]\.self_attn\.[qv]_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "k_proj"]},
    ],
    ids=str,
)
def test_whatever_layers_peft_has_adapted(tmp_path, targets):
    torch.manual_seed(2)
    reference = get_peft_model(hf_reference(random_model()), PeftConfig(r=4, init_lora_weights=False, **targets))
    reference.save_pretrained(tmp_path)
    tokens = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        expected, logits = reference(tokens).logits, load_adapter(random_model(), tmp_path)(tokens)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({}, None),
        ({"r": 16, "use_rslora": True, "modules_to_save": None, "rank_pattern": {}}, None),
        ({"r": 100}, "rank 100 needs --max-lora-rank 128"),
        ({"r": 513}, "rank 513 is above its largest, 512"),
        ({"use_dora": True}, "does not know DoRA"),
        ({"modules_to_save": ["lm_head"]}, "no modules_to_save"),
        ({"bias": "all"}, "no trained biases"),
        ({"rank_pattern": {"q_proj": 4}}, "ignores rank_pattern"),
        ({"peft_type": "ADAPTION_PROMPT"}, "serves LoRA only, not ADAPTION_PROMPT"),
    ],
    ids=str,
)
def test_what_vllm_would_refuse(settings, refused):
    found = vllm_refusals(peft_config(LoraConfig(), "base", 3) | settings)
    assert found == [] if refused is None else len(found) == 1 and refused in found[0]


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    config = LoraConfig(rank=4)
    save_adapter(adapted(config), tmp_path / "a", config, "base")
    with pytest.raises(UserError, match=r"layers.3.self_attn.q_proj.lora_A.weight is missing"):
        load_adapter(random_model(num_hidden_layers=4), tmp_path / "a")
    with pytest.raises(UserError, match=r"shape \[4, 32\], not \[4, 64\]"):
        load_adapter(random_model(hidden_size=64), tmp_path / "a")
    with pytest.raises(UserError, match=r"adapter .* does not exist"):
        load_adapter(random_model(), tmp_path / "b")
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    for change, named in (
        ({"r": 2**24}, r"q_proj.lora_A.weight has shape \[4, 32\], not \[16777216, 32\]"),
        ({"use_dora": True}, "q_proj.lora_magnitude_vector is missing"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"use_qalora": True}, "use_qalora = True is not supported"),
    ):
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=named):
            load_adapter(random_model(), tmp_path / "a")


def test_saving_changes_nothing_and_replaces_the_whole_folder(tmp_path):
    config = LoraConfig(rank=4)
    model = adapted(config)
    before = {name: p.clone() for name, p in trainable(model).items()}
    others = [tmp_path / "a.old", tmp_path / "a.partial"]  # as users call things
    for other in others:
        other.mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a/own").touch()
    with pytest.raises(UserError, match="a holds other files: give a new folder"):
        save_adapter(model, tmp_path / "a", config, "base")
    assert (tmp_path / "a/own").exists() and len(list(tmp_path.iterdir())) == 3
    for name in ("adapter_config.json", "old"):
        (tmp_path / "a" / name).touch()
    save_adapter(model, tmp_path / "a", config, "base")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a", *others]
    assert_same(before, trainable(model))


@pytest.mark.parametrize("layers", [2, 30])
def test_peft_reads_our_llama_adapter_and_we_read_pefts(tmp_path, layers):
    config = LlamaAdapterConfig(prompt_len=5, layers=layers)
    model = prompted(config)
    save_adapter(model, tmp_path / "ours", config, "some/base")
    count = min(layers, 3)
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text()) == {
        "adapter_layers": count,
        "adapter_len": 5,
        "base_model_name_or_path": "some/base",
        "inference_mode": True,
        "peft_type": "ADAPTION_PROMPT",
        "target_modules": "self_attn",
        "task_type": "CAUSAL_LM",
    }
    prompted_reference(model, config)[0].save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs")]
    assert_same(*files)
    assert {(name.rpartition(".")[2], *value.shape) for name, value in files[0].items()} == {
        ("adaption_prompt", 1, 5, 32),
        ("adaption_gate", 1),
    }
    shutil.copytree(tmp_path / "theirs", tmp_path / "bare")
    bare = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 5, "adapter_layers": count}
    (tmp_path / "bare/adapter_config.json").write_text(json.dumps(bare))

    tokens = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(hf_reference(random_model()), tmp_path / "ours")(tokens).logits
        for folder in ("ours", "theirs", "bare"):
            loaded = load_adapter(random_model(), tmp_path / folder)
            assert torch.equal(loaded(tokens), model(tokens))
            assert (loaded(tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert not any(p.requires_grad for name, p in loaded.named_parameters() if "adaption" in name)


def test_llama_adapters_that_do_not_fit_are_refused(tmp_path):
    config = LlamaAdapterConfig(prompt_len=5, layers=3)
    save_adapter(prompted(config), tmp_path, config, "base")
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    with pytest.raises(UserError, match=r"layers.2.self_attn.adaption_gate is unexpected"):
        load_adapter(random_model(num_hidden_layers=2), tmp_path)
    with pytest.raises(UserError, match=r"layers.3.self_attn.adaption_gate is missing"):
        load_adapter(random_model(num_hidden_layers=4), tmp_path)
    with pytest.raises(UserError, match=r"shape \[1, 5, 32\], not \[1, 5, 64\]"):
        load_adapter(random_model(hidden_size=64), tmp_path)
    for change, named in [
        ({"adapter_len": 2**24}, r"shape \[1, 5, 32\], not \[1, 16777216, 32\]"),
        ({"adapter_len": 6}, r"shape \[1, 5, 32\], not \[1, 6, 32\]"),
        ({"adapter_len": 0}, "needs the whole numbers adapter_len and adapter_layers"),
        ({"adapter_layers": None}, "needs the whole numbers adapter_len and adapter_layers"),
        ({"target_modules": "mlp"}, "target_modules = 'mlp' is not supported"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
    ]:
        file.write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=named):
            load_adapter(random_model(), tmp_path)


def test_a_second_adapter_is_refused_until_the_first_is_merged(tmp_path):
    lora, prompts = LoraConfig(rank=4), LlamaAdapterConfig(prompt_len=5)
    save_adapter(adapted(lora), tmp_path / "lora", lora, "base")
    save_adapter(prompted(prompts), tmp_path / "prompts", prompts, "base")
    model = load_adapter(random_model(), tmp_path / "lora")
    for folder in ("lora", "prompts"):
        with pytest.raises(
            UserError, match=r"the model has an adapter already \(model.layers.0.self_attn.q_proj.lora_A"
        ):
            load_adapter(model, tmp_path / folder)
    load_adapter(merge_lora(model), tmp_path / "prompts")


def test_adapters_of_another_kind_than_the_config_are_not_saved(tmp_path):
    lora, prompts = LoraConfig(rank=4), LlamaAdapterConfig(prompt_len=5)
    both = apply_llama_adapter(adapted(lora), prompts)
    for model, config, named in [
        (both, lora, r"adaption_gate \[1\] is unexpected"),
        (both, prompts, r"lora_A.weight \[4, 32\] is unexpected"),
        (adapted(lora), prompts, r"adaption_gate \[1\] is missing"),
        (random_model(), lora, r"lora_A.weight \[4, 32\] is missing"),
        (adapted(lora), LoraConfig(rank=8), r"lora_A.weight \[8, 32\] is missing"),
    ]:
        with pytest.raises(UserError, match=f"not those of the config, and PEFT's format holds one kind.*{named}"):
            save_adapter(model, tmp_path / "a", config, "base")
    assert not list(tmp_path.iterdir())


def full_model(mesh, folder):
    """A sharded model as full fine-tuning has it: fp32 masters, not those of the file."""
    with torch.device("meta"):
        model = Llama(read_config(folder))
    set_dtypes(model, FsdpConfig(precision="mixed"))
    shard(model, mesh, FsdpConfig(strategy="full-shard", precision="mixed"))
    materialise(model, "cpu")
    load_weights(model, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    return model


def save_from_ranks(mesh, base, outs):
    import minillama.formats.hf

    model = full_model(mesh, base)
    before = {name: local(p).clone() for name, p in model.named_parameters()}
    for out, max_bytes in outs.items():
        minillama.formats.hf_export.MAX_FILE_BYTES = max_bytes
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.long))  # leaves gathered bf16 copies of some parameters
        save_pretrained(model, out, base)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return all(torch.equal(local(p), before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_model_is_saved_as_transformers_reads_it(tmp_path, tied):
    base = save_folder(random_model(tie_word_embeddings=tied).bfloat16(), tmp_path / "base", tie_word_embeddings=tied)
    trained = from_pretrained(base, dtype=torch.float32)
    for parameter in trained.parameters():
        parameter.mul_(1.01)
    expected = {name: p.bfloat16() for name, p in trained.named_parameters()}
    size = sum(2 * p.numel() for p in expected.values())
    one, several = tmp_path / "one", tmp_path / "several"
    assert run_ranks(save_from_ranks, 2, base, {one: 2**32, several: 30_000}) == [True, True]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "one", "several"]

    assert sorted(p.name for p in one.iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    index = json.loads((several / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": size} and index["weight_map"].keys() == expected.keys()
    files = sorted(p.name for p in several.glob("*.safetensors"))
    assert len(files) > 2 and files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file in [one / "model.safetensors", *(several / file for file in files)]:
        with safe_open(file, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
        held = load_file(file)
        if file.parent == several:
            assert len(held) == 1 or sum(2 * p.numel() for p in held.values()) <= 30_000
            assert set(held) == {name for name, where in index["weight_map"].items() if where == file.name}
        assert file.stat().st_mode == (one / "config.json").stat().st_mode

    tokens = torch.randint(0, 512, (2, 30))
    for out in (one, several):
        loaded = from_pretrained(out)
        assert_same(parameters(loaded), expected)
        reference = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            ours, theirs = loaded.float()(tokens), reference(tokens).logits
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_every_tensor_keeps_the_dtype_of_the_base(tmp_path):
    base = save_folder(random_model(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()}, base / "model.safetensors")
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"):
        (base / name).write_text(f'{{"from": "{name}"}}')
    model = random_model(seed=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(2):  # the second replaces the first
        save_pretrained(model, tmp_path / "out", base)
        (tmp_path / "out/leftover").touch()
    save_pretrained(model, tmp_path / "out", base)
    assert_same(before, parameters(model))
    saved = load_file(tmp_path / "out/model.safetensors")
    assert_same(saved, {n: p if "norm" in n else p.bfloat16() for n, p in before.items()})
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted({p.name for p in base.iterdir()} - {"notes.txt"})
    for name in set(names) - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_the_tokenizer_given_apart_is_the_one_saved(tmp_path):
    base = save_folder(random_model(), tmp_path / "base")
    (base / "tokenizer_config.json").write_text("base")
    other = tmp_path / "other"
    other.mkdir()
    content = (base / "tokenizer.model").read_text() + "\n"
    (other / "llama.model").write_text(content)
    (other / "special_tokens_map.json").write_text("{}")
    save_pretrained(random_model(), tmp_path / "file", base, other / "llama.model")
    (other / "llama.model").rename(other / "tokenizer.model")
    save_pretrained(random_model(), tmp_path / "folder", base, other)
    for out in (tmp_path / "file", tmp_path / "folder"):
        assert sorted(p.name for p in out.iterdir()) == [
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.model",
        ]
        assert (out / "tokenizer.model").read_text() == content
    (other / "tokenizer.model").write_text("other")
    with pytest.raises(UserError, match="neither a tiktoken nor a sentencepiece file"):
        save_pretrained(random_model(), tmp_path / "out", base, other)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        save_pretrained(random_model(), tmp_path / "out", base, tmp_path / "nowhere")


@pytest.mark.parametrize("head_in_file", [False, True])
@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens", "q_proj")])
def test_a_merged_model_whose_head_is_no_longer_tied(tmp_path, targets, head_in_file):
    base = save_folder(random_model(tie_word_embeddings=True), tmp_path / "base", tie_word_embeddings=True)
    if head_in_file:
        tensors = load_file(base / "model.safetensors")
        save_file(
            tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors"
        )
    model = merge_lora(adapted(LoraConfig(rank=4, targets=targets), tie_word_embeddings=True))
    save_pretrained(model, tmp_path / "out", base)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        expected = model(tokens)
        for logits in (from_pretrained(tmp_path / "out")(tokens), reference(tokens).logits):
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_cannot_be_saved_is_refused(tmp_path):
    base = save_folder(random_model(), tmp_path / "in/base")
    for out in (base, tmp_path / "in", tmp_path / "in/base/../base"):
        with pytest.raises(UserError, match="cannot be written: the base model is there"):
            save_pretrained(random_model(), out, base)
    with pytest.raises(UserError, match=r"has adapter parameters \(.*lora_A.weight\).*merge_lora first"):
        save_pretrained(apply_lora(random_model(), LoraConfig()), tmp_path / "out", base)
    with pytest.raises(UserError, match="do not fit their config"):
        save_pretrained(random_model(hidden_size=64), tmp_path / "out", base)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out cannot be written \(a file is where a folder should be\)"):
        save_pretrained(random_model(), tmp_path / "file/out", base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "in"]


def fail_in_the_middle(mesh, base, out):
    import minillama.formats.hf

    written = []

    def full_disk(file, tensors):
        if len(written) == 2:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(file))
        written.append(file)
        write(file, tensors)

    minillama.formats.hf_export.MAX_FILE_BYTES = 30_000
    write, minillama.formats.hf_export.write_tensors = minillama.formats.hf_export.write_tensors, full_disk
    model = full_model(mesh, base)
    messages = []
    for folder in (out, base / "config.json/out"):
        try:
            save_pretrained(model, folder, base)
        except UserError as error:
            messages.append(str(error))
    return messages, len(written) if dist.get_rank() == 0 else 2


def test_a_failing_disk_leaves_what_was_there_and_fails_on_every_rank(tiny_folder, tmp_path):
    earlier = save_folder(random_model(), tmp_path / "out")
    (first, written), (second, _) = run_ranks(fail_in_the_middle, 2, tiny_folder, tmp_path / "out")
    assert written == 2 and len(first) == 2 and first == second
    assert "out cannot be written (No space left on device; 0.15 MB are needed): make room on its disk" in first[0]
    assert "out cannot be written (a file is where a folder should be)" in first[1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert_same(parameters(from_pretrained(earlier)), parameters(random_model()))


def save_prompts(mesh, folder, out):
    config = LlamaAdapterConfig(prompt_len=5, layers=2)
    with torch.device("meta"):
        model = apply_llama_adapter(Llama(read_config(folder)).requires_grad_(False), config)
    set_dtypes(model, FP32)
    shard(model, mesh, FP32)
    materialise(model, "cpu")
    load_weights(model, folder)
    values = trainable(prompted(config))
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            local(parameter).copy_(local(like(values[name], parameter)))
    save_adapter(model, out, config, "base")
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        return model(tokens)


def save_dora(mesh, folder, adapter, out):
    """The adapter through a sharded model: no parameter divides evenly over the ranks."""
    config = LoraConfig(rank=4, targets=("all-linear",), dora=True)
    with torch.device("meta"):
        model = apply_lora(Llama(read_config(folder)).requires_grad_(False), config)
    set_dtypes(model, FP32)
    shard(model, mesh, FP32)
    materialise(model, "cpu")
    load_weights(model, folder)
    load_adapter_weights(model, adapter)
    save_adapter(model, out, config, "base")


def test_a_sharded_dora_loads_and_saves_as_a_whole_one(tiny_folder, tmp_path):
    config = LoraConfig(rank=4, targets=("all-linear",), dora=True)
    save_adapter(adapted(config), tmp_path / "one", config, "base")
    run_ranks(save_dora, 3, tiny_folder, tmp_path / "one", tmp_path / "three")
    one, three = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("one", "three"))
    assert one.keys() == three.keys() and any("magnitude" in name for name in one)
    for name, tensor in one.items():
        torch.testing.assert_close(three[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_sharded_llama_adapter_computes_and_saves_as_a_whole_one(tiny_folder, tmp_path):
    config = LlamaAdapterConfig(prompt_len=5, layers=2)
    whole = prompted(config)
    save_adapter(whole, tmp_path / "one", config, "base")
    logits = run_ranks(save_prompts, 2, tiny_folder, tmp_path / "two")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with torch.no_grad():
        for found in logits:
            torch.testing.assert_close(found, whole(torch.arange(40).view(1, 40)), rtol=1e-5, atol=1e-5)
