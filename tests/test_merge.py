"""Base and adapter, or base and checkpoint, as one folder: the logits of the two together, and what is refused."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY, random_model, run_script, save_folder
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file
from test_lora import adapted
from test_meta import meta_folder
from test_model import hf_reference

import minillama.adapters.merge
import minillama.formats.hf_export
from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig
from minillama.adapters.merge import ShardedWeights, adapter_of, export_checkpoint, merge_adapter
from minillama.adapters.peft import save_adapter
from minillama.errors import UserError
from minillama.formats.hf import from_pretrained

ROOT = Path(__file__).parents[1]
TIED = {"tie_word_embeddings": True}
EVERYWHERE = ("all-linear", "embed_tokens", "lm_head")


@pytest.fixture
def small_pieces(monkeypatch):
    """Every matrix is read in several pieces, and written into several files."""
    monkeypatch.setattr(minillama.formats.hf_export, "WRITE_BYTES", 1500)
    monkeypatch.setattr(minillama.formats.hf_export, "MAX_FILE_BYTES", 60_000)
    monkeypatch.setattr(minillama.adapters.merge, "LENGTH_ROWS", 7)


def assert_close(logits, expected):
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        ({}, {}),
        ({"targets": ("all-linear",), "rslora": True}, TIED),
        ({"targets": ("all-linear",), "dora": True}, {"attention_bias": True, "mlp_bias": True}),
        ({"targets": EVERYWHERE}, {}),
        ({"targets": EVERYWHERE}, TIED),
        ({"targets": ("lm_head",)}, TIED),
    ],
    ids=str,
)
def test_merged_is_base_and_adapter(tmp_path, small_pieces, lora, changes):
    config = LoraConfig(rank=4, **lora)
    base = save_folder(random_model(**changes), tmp_path / "base", **changes)
    model = adapted(config, **changes)
    save_adapter(model, tmp_path / "adapter", config, str(base))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    assert (tmp_path / "merged/tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    tokens = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        expected = model(tokens)
        assert_close(from_pretrained(tmp_path / "merged")(tokens), expected)
        reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
        assert reference.config.tie_word_embeddings == (changes == TIED and "lm_head" not in config.targets)
        assert_close(reference(tokens).logits, expected)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_pefts_own_into_a_meta_folder(tmp_path, dora):
    source = save_folder(random_model(), tmp_path / "hf")
    base = meta_folder(tmp_path / "meta", source)
    shutil.copy(source / "tokenizer.model", base)
    torch.manual_seed(2)
    reference = get_peft_model(
        hf_reference(random_model()),
        PeftConfig(r=4, target_modules="all-linear", use_dora=dora, init_lora_weights=False),
    )
    reference.save_pretrained(tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    tokens = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        assert_close(from_pretrained(tmp_path / "merged")(tokens), reference(tokens).logits)
        assert_close(
            from_pretrained(tmp_path / "merged")(tokens), reference.merge_and_unload()(tokens).logits
        )  # peft's own merge
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["eos_token_id"] == 257 and config["bos_token_id"] == 256


def test_the_sum_is_made_in_fp32_and_cast_once(tmp_path):
    config = LoraConfig(rank=4, targets=("q_proj",))
    base = save_folder(random_model().bfloat16(), tmp_path / "base")
    model = adapted(config)
    save_adapter(model, tmp_path / "adapter", config, str(base))
    q = model.model.layers[0].self_attn.q_proj
    exact = q.weight.bfloat16().double() + config.scale * q.lora_B.weight.double() @ q.lora_A.weight.double()
    for dtype in (None, torch.float32):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
        merged = load_file(tmp_path / "merged/model.safetensors")
        found = merged["model.layers.0.self_attn.q_proj.weight"]
        assert found.dtype == (dtype or torch.bfloat16)
        assert json.loads((tmp_path / "merged/config.json").read_text())["torch_dtype"] == str(found.dtype)[6:]
        if dtype is None:
            assert (found == exact.bfloat16()).float().mean() > 0.999  # but where fp32 is half way between two
        else:
            torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7)
        norm = merged["model.norm.weight"]
        assert torch.equal(norm, load_file(base / "model.safetensors")["model.norm.weight"].to(norm.dtype))


def test_another_base_is_refused_by_name(tmp_path):
    config = LoraConfig(rank=4)
    base = save_folder(random_model(), tmp_path / "Llama-1B")
    other = save_folder(random_model(seed=1), tmp_path / "Llama-1B-Instruct")
    adapter = tmp_path / "adapter"

    def merged(onto, named, **more):
        save_adapter(adapted(config), adapter, config, named)
        merge_adapter(onto, adapter, tmp_path / "merged", **more)

    for named in (str(base), "meta/Llama-1B", ""):
        merged(base, named)
    merged(shutil.copytree(base, tmp_path / "copy"), str(base))  # the same content
    merged(other, str(base), any_base=True)
    cached = tmp_path / "models--meta--Llama-1B/snapshots/0123"
    merged(shutil.copytree(base, cached), "meta/Llama-1B")
    shutil.rmtree(tmp_path / "merged")
    for named in (str(base), "meta/Llama-1B"):
        with pytest.raises(
            UserError,
            match=f"was trained on {named}, as its adapter_config.json says, and .*Llama-1B-Instruct is not that model",
        ):
            merged(other, named)
    with pytest.raises(
        UserError, match=r"Llama-1B is a model folder \(it has no adapter_config.json\): give the adapter/"
    ):
        merge_adapter(base, base, tmp_path / "merged")
    deeper = save_folder(random_model(num_hidden_layers=4), tmp_path / "deep/Llama-1B", num_hidden_layers=4)
    with pytest.raises(UserError, match=r"layers.3.self_attn.q_proj.lora_A.weight is missing"):
        merged(deeper, "meta/Llama-1B")
    prompts = LlamaAdapterConfig(prompt_len=5)
    save_adapter(apply_llama_adapter(random_model(), prompts), tmp_path / "prompts", prompts, str(base))
    with pytest.raises(UserError, match="is a llama-adapter, which cannot be merged"):
        merge_adapter(base, tmp_path / "prompts", tmp_path / "merged")
    with pytest.raises(UserError, match="adapter is an adapter: give the model it is for"):
        merge_adapter(adapter, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def tool(name, *flags):
    """Exit code of tools/NAME.py, which prints what is wrong."""
    before, sys.argv = sys.argv, [name, *map(str, flags)]
    try:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before


def same_tensors(one, other):
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Runs a recipe for two steps on two ranks; the folder it leaves."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"dialogue": f"A: {'hi ' * i}", "summary": f"They part, {i}."} for i in range(4)]
    (folder / "train.json").write_text(json.dumps(rows))

    def train(recipe, model, *flags):
        common = ["--model", model, "--output-dir", folder / f"out{len(list(folder.iterdir()))}", "--device", "cpu"]
        common += ["--data.path", folder / "train.json", "--data.context-length", 100, "--eval.no-enabled"]
        common += ["--train.batch-size", 1, "--train.max-steps", 2, "--optim.lr", 0.02]
        script = ROOT / "recipes" / f"{recipe}_fsdp.py"
        codes, text = run_script(script, *common, *flags, world_size=2, log=folder / "log")
        assert codes == [0, 0], text
        return common[3], text

    return train


def test_a_full_checkpoint_is_the_model_that_the_run_left(train, tmp_path, small_pieces, capsys):
    base = save_folder(random_model(**TIED).bfloat16(), tmp_path / "base", **TIED)
    out, _ = train("full", base)
    checkpoint = out / "checkpoints/step-00000002"
    assert tool("convert_checkpoint", checkpoint, tmp_path / "hf") == 0
    tokens = torch.randint(0, 512, (2, 30))
    for (name, ours), (_, theirs) in zip(
        from_pretrained(tmp_path / "hf").named_parameters(),
        from_pretrained(out / "model").named_parameters(),
        strict=True,
    ):
        assert torch.equal(ours, theirs) and ours.dtype == torch.bfloat16, name
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        assert_close(from_pretrained(tmp_path / "hf").float()(tokens), reference(tokens).logits)

    assert tool("convert_checkpoint", out, tmp_path / "x") == 1
    assert "is the output of a run: give the model/ in it" in capsys.readouterr().err
    with pytest.raises(UserError, match="full fine-tuning and has no adapter"):
        export_checkpoint(checkpoint, tmp_path / "x", adapter_only=True)
    with pytest.raises(UserError, match=r"other is not the model that .* was trained on"):
        export_checkpoint(checkpoint, tmp_path / "x", save_folder(random_model(seed=1), tmp_path / "other"))
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="base is not there: give its folder by --base"):
        export_checkpoint(checkpoint, tmp_path / "x")
    export_checkpoint(checkpoint, tmp_path / "again", tmp_path / "moved")
    file = next(checkpoint.glob("__1_*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is not a sound checkpoint, give another: __1_0.distcp has \d+ bytes"):
        export_checkpoint(checkpoint, tmp_path / "x", tmp_path / "moved")
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize(
    "flags", [("--lora.targets", "q_proj", "lm_head", "embed_tokens"), ("--lora.dora", "--checkpoint.format", "full")]
)
def test_a_lora_checkpoint_is_the_adapter_and_the_merged_model_that_the_run_left(train, tmp_path, flags, capsys):
    base = save_folder(random_model().bfloat16(), tmp_path / "base")
    out, text = train("lora", base, "--lora.merge", "--fsdp.strategy", "full-shard", *flags)
    assert text.count("base and LoRA in one") == 1
    assert text.count("does not know DoRA") == ("--lora.dora" in flags)
    checkpoint = out / "checkpoints/step-00000002"
    assert tool("convert_checkpoint", checkpoint, tmp_path / "adapter", "--adapter-only") == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (out / "adapter" / file).read_bytes()
    assert tool("convert_checkpoint", checkpoint, tmp_path / "hf") == 0
    assert tool("merge_lora", base, out / "adapter", tmp_path / "merged") == 0
    for folder in ("merged", "hf"):
        same_tensors(tmp_path / folder / "model.safetensors", out / "model/model.safetensors")
    for adapter, target, message in (
        (out / "adapter", tmp_path / "merged", "merged exists already"),
        (out / "adapter", out / "adapter/merged", f"adapter/merged is in {out / 'adapter'}, which is read"),
        (out, tmp_path / "x", f"{out} is the output of a run (it has no adapter_config.json): give {out / 'adapter'}"),
    ):
        assert tool("merge_lora", base, adapter, target) == 1
        assert message in capsys.readouterr().err


def test_a_llama_adapters_checkpoint_is_the_adapter_that_the_run_left(train, tmp_path):
    base = save_folder(random_model(), tmp_path / "base")
    out, _ = train("llama_adapter", base)
    with pytest.raises(UserError, match="--dtype float16: an adapter alone is written"):
        export_checkpoint(out / "checkpoints/step-00000002", tmp_path / "adapter", dtype=torch.float16)
    assert tool("convert_checkpoint", out / "checkpoints/step-00000002", tmp_path / "adapter") == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (out / "adapter" / file).read_bytes()


def test_checkpoints_of_before_dora_are_still_loras():
    flags = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj"], "rslora": True, "from_": None}
    assert adapter_of({"flags": {"lora": flags}}) == LoraConfig(4, 8.0, 0.0, ("q_proj",), True, False)
    assert adapter_of({"flags": {"model": "base"}}) is None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_rows_of_a_sharded_checkpoint(train, tmp_path):
    """Any piece, across the edge between two ranks' shards, is what torch.distributed.checkpoint loads."""
    import torch.distributed.checkpoint as dcp

    out, _ = train("full", save_folder(random_model(), tmp_path / "base"))
    weights = ShardedWeights(out / "checkpoints/step-00000002")
    assert set(weights.names) == set(dict(random_model().named_parameters()))
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        whole = torch.empty(weights.shape(name), dtype=weights.dtype(name))
        reader = dcp.FileSystemReader(out / "checkpoints/step-00000002")
        dcp.load({"model": {name: whole}}, storage_reader=reader, no_dist=True)
        height = len(whole)
        for start, stop in ((0, height), (height // 2 - 3, height // 2 + 5), (0, 1), (height - 1, height)):
            assert torch.equal(weights.rows(name, start, stop), whole[start:stop])
    assert TINY["vocab_size"] == weights.shape("lm_head.weight")[0]
