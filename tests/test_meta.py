"""Meta's folders: read and written, compared with the same weights in Hugging Face's order."""

import json
import pickle
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from conftest import TINY, random_model, save_folder

from minillama.errors import UserError
from minillama.formats.hf import from_pretrained, open_weights, read_config, weights_fingerprint
from minillama.formats.meta import (
    feed_forward_width,
    half_split,
    interleaved,
    meta_params,
    read_meta_config,
    write_meta,
)
from minillama.model.config import LlamaConfig

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "weights"
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VARIANTS = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4, "rope_theta": 500000.0},
    "scaled": {"rope_scaling": LLAMA31, "rope_theta": 500000.0, "intermediate_size": 52},
}


def meta_folder(path, source, files=1, dtype=None):
    path.mkdir(parents=True)
    write_meta(open_weights(source), read_config(source), path, files=files, dtype=dtype)
    return path


def reference_permutation(weight, head_dim):
    """Hugging Face's rows in Meta's order, by the formula of Meta's own converter."""
    heads = weight.shape[0] // head_dim
    return weight.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_equal_to_the_bit(tmp_path, variant, files):
    model = random_model(**VARIANTS[variant]).bfloat16()
    source = save_folder(model, tmp_path / "hf", **VARIANTS[variant])
    folder = meta_folder(tmp_path / "meta", source, files)
    assert sorted(p.name for p in folder.glob("*.pth")) == [f"consolidated.0{n}.pth" for n in range(files)]
    back = from_pretrained(folder)
    before = model.state_dict()
    assert back.state_dict().keys() == before.keys()
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name]), name
    config, theirs = read_config(source), read_meta_config(folder)
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
    ):
        assert getattr(config, field) == getattr(theirs, field)
    assert config.rope_scaling == theirs.rope_scaling and config.tie_word_embeddings == theirs.tie_word_embeddings
    params = json.loads((folder / "params.json").read_text())
    assert params.get("use_scaled_rope", False) == (variant == "scaled")
    width = feed_forward_width(params["dim"], params["multiple_of"], params["ffn_dim_multiplier"])
    assert width == config.intermediate_size


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fingerprint_is_that_of_the_same_weights_in_hugging_faces_format(tmp_path, variant, files):
    changes = VARIANTS[variant]
    if scaling := changes.get("rope_scaling"):
        changes = changes | {"rope_scaling": dict(reversed(scaling.items())) | {"factor": 32}}
    source = save_folder(random_model(**changes), tmp_path / "hf", **changes)
    print_ = weights_fingerprint(source)
    assert weights_fingerprint(meta_folder(tmp_path / "meta", source, files)) == print_
    others = [{"rms_norm_eps": 1e-6}, {"rope_theta": 1.0}, {"rope_scaling": LLAMA31 | {"factor": 8.0}}]
    for number, other in enumerate(others):
        folder = save_folder(random_model(**changes), tmp_path / str(number), **changes | other)
        assert weights_fingerprint(folder) != print_
    assert weights_fingerprint(save_folder(random_model(seed=1, **changes), tmp_path / "x", **changes)) != print_


@pytest.mark.parametrize("files", [1, 2])
def test_the_files_are_as_metas_own_converter_writes_them(tmp_path, files):
    model = random_model()
    folder = meta_folder(tmp_path / "meta", save_folder(model, tmp_path / "hf"), files)
    ours = model.state_dict()
    for number in range(files):
        tensors = torch.load(folder / f"consolidated.0{number}.pth", weights_only=True)
        assert len(tensors) == 3 + 9 * 3

        def part(name, dim, number=number):
            weight = ours[name]
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = reference_permutation(weight, 8)
            return weight if dim is None else weight.chunk(files, dim)[number]

        for theirs, name, dim in (
            ("tok_embeddings.weight", "model.embed_tokens.weight", 0),
            ("output.weight", "lm_head.weight", 0),
            ("norm.weight", "model.norm.weight", None),
            ("layers.1.attention.wq.weight", "model.layers.1.self_attn.q_proj.weight", 0),
            ("layers.1.attention.wk.weight", "model.layers.1.self_attn.k_proj.weight", 0),
            ("layers.1.attention.wv.weight", "model.layers.1.self_attn.v_proj.weight", 0),
            ("layers.1.attention.wo.weight", "model.layers.1.self_attn.o_proj.weight", 1),
            ("layers.2.feed_forward.w1.weight", "model.layers.2.mlp.gate_proj.weight", 0),
            ("layers.2.feed_forward.w2.weight", "model.layers.2.mlp.down_proj.weight", 1),
            ("layers.2.feed_forward.w3.weight", "model.layers.2.mlp.up_proj.weight", 0),
            ("layers.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight", None),
        ):
            assert torch.equal(tensors[theirs], part(name, dim)), theirs


def test_llama_2s_files_split_the_embedding_by_columns(tmp_path):
    model = random_model()
    source = save_folder(model, tmp_path / "hf")
    folder = meta_folder(tmp_path / "meta", source, 2)
    for number, half in enumerate(model.model.embed_tokens.weight.detach().chunk(2, dim=1)):
        file = folder / f"consolidated.0{number}.pth"
        tensors = torch.load(file, weights_only=True)
        torch.save(tensors | {"tok_embeddings.weight": half.clone(), "rope.freqs": torch.zeros(4)}, file)
    tokens = torch.arange(9)[None]
    assert torch.equal(from_pretrained(folder)(tokens), model(tokens))


def test_a_few_rows_at_a_time(tmp_path, monkeypatch):
    model = random_model()
    source = save_folder(model, tmp_path / "hf")
    monkeypatch.setattr("minillama.formats.meta.PIECE_BYTES", 300)
    folder = meta_folder(tmp_path / "meta", source, 2, torch.bfloat16)
    monkeypatch.setattr("minillama.formats.hf.READ_BYTES", 300)
    for name, tensor in from_pretrained(folder, dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float()), name


def test_rows_of_heads_are_permuted_one_to_one():
    rows = torch.arange(48)
    for head_dim in (2, 4, 8, 16):
        assert torch.equal(half_split(interleaved(rows, head_dim), head_dim), rows)
        weight = torch.arange(48.0)[:, None]
        assert torch.equal(weight[half_split(rows, head_dim)], reference_permutation(weight, head_dim))


@pytest.mark.parametrize("dim, inner", [(4096, 14336), (8192, 28672), (16384, 53248), (2048, 8192), (3072, 8192)])
def test_feed_forward_widths_of_llama_3(dim, inner):
    config = LlamaConfig(hidden_size=dim, intermediate_size=inner, num_attention_heads=32)
    params = meta_params(config)
    assert feed_forward_width(dim, params["multiple_of"], params["ffn_dim_multiplier"]) == inner
    for inner in range(1, 400):
        params = meta_params(LlamaConfig(hidden_size=64, intermediate_size=inner, num_attention_heads=8))
        assert feed_forward_width(64, params["multiple_of"], params["ffn_dim_multiplier"]) == inner


def test_what_metas_format_cannot_say(tmp_path):
    for changes, message in (
        ({"attention_bias": True}, "no place for attention_bias"),
        ({"head_dim": 16}, "no place for head_dim 16"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "no place for rope type linear"),
    ):
        with pytest.raises(UserError, match=message):
            meta_params(LlamaConfig.from_dict(TINY | changes))
    source = save_folder(random_model(), tmp_path / "hf")
    for files, message in ((3, "--files 3: n_kv_heads 2 is not a multiple"), (4, "--files 4: n_kv_heads 2")):
        with pytest.raises(UserError, match=message):
            meta_folder(tmp_path / str(files), source, files)


class Code:
    def __reduce__(self):
        return print, ("code runs",)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # PyTorch 2.11's own
def test_bad_folders(tmp_path, capsys):
    source = save_folder(random_model(), tmp_path / "hf")

    def folder(name, change):
        path = meta_folder(tmp_path / name, source, 2)
        change(path)
        return path

    def edit(path, **changes):
        params = json.loads((path / "params.json").read_text()) | changes
        (path / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v is not None}))

    def without(path, name, number=1):
        file = path / f"consolidated.0{number}.pth"
        tensors = torch.load(file, weights_only=True)
        del tensors[name]
        torch.save(tensors, file)

    def cut(path):
        content = (path / "consolidated.00.pth").read_bytes()
        (path / "consolidated.00.pth").write_bytes(content[: len(content) // 2])

    def put(path, tensor, name="output.weight"):
        file = path / "consolidated.00.pth"
        torch.save(torch.load(file, weights_only=True) | {name: tensor}, file)

    def packed(path):
        put(path, torch.ones(64, 32))  # whose checksums are right
        with ZipFile(path / "consolidated.00.pth") as source:
            entries = {name: source.read(name) for name in source.namelist()}
        with ZipFile(path / "consolidated.00.pth", "w", ZIP_DEFLATED) as target:
            for name, content in entries.items():
                target.writestr(name, content)

    cases = [
        ("gap", lambda p: (p / "consolidated.00.pth").unlink(), "without gaps; there: consolidated.01.pth"),
        ("none", lambda p: [f.unlink() for f in p.glob("*.pth")], "there: none"),
        ("cut", cut, "consolidated.00.pth cannot be read, it may be truncated"),
        ("empty", lambda p: (p / "consolidated.00.pth").write_bytes(b""), "or not written by torch.save of"),
        ("code", lambda p: (p / "consolidated.00.pth").write_bytes(pickle.dumps(Code())), "cannot be read, it may be"),
        (
            "code2",
            lambda p: torch.save({"a": Code()}, p / "consolidated.00.pth"),
            "holds more than tensors, which may be code, and is not read$",
        ),
        ("larger", lambda p: put(p, torch.ones(1).expand(2**24, 32)), "tensors that are larger than the file"),
        ("nowhere", lambda p: put(p, torch.ones(64, 32, device="meta")), "holds 'output.weight', which is no matrix"),
        ("sparse", lambda p: put(p, torch.ones(64, 32).to_sparse()), "holds 'output.weight', which is no matrix"),
        ("scalar", lambda p: put(p, torch.tensor(1.0)), "holds 'output.weight', which is no matrix"),
        ("nothing", lambda p: put(p, torch.ones(0, 32)), "holds 'output.weight', which is no matrix"),
        ("number", lambda p: put(p, torch.ones(2), 5), "holds 5, which is no matrix"),
        ("packed", packed, "consolidated.00.pth cannot be read"),
        ("list", lambda p: torch.save([1], p / "consolidated.00.pth"), "does not hold tensors by name"),
        (
            "lacks",
            lambda p: without(p, "layers.1.attention.wo.weight"),
            "consolidated.01.pth lacks layers.1.attention.wo",
        ),
        (
            "head",
            lambda p: [without(p, "output.weight", n) for n in (0, 1)],
            "lacks output.weight, the head, which Meta's own files have even",
        ),
        ("layers", lambda p: edit(p, n_layers=2), "tensors that no Llama has: layers.2.attention"),
        ("dim", lambda p: edit(p, dim=None), "params.json lacks dim"),
        ("heads", lambda p: edit(p, n_kv_heads=4), "k_proj.weight has shape .16, 32., the config asks for .32, 32."),
        ("scaled", lambda p: edit(p, use_scaled_rope=True), "add .rope_scaling_factor.: 8 for Llama 3.1 and 3.3, 32"),
        ("json", lambda p: (p / "params.json").write_text("{"), "params.json cannot be read"),
    ]
    for name, change, message in cases:
        with pytest.raises(UserError, match=message):
            from_pretrained(folder(name, change))
    assert "code runs" not in capsys.readouterr().out


@pytest.mark.skipif(not REAL.exists(), reason="needs the optional real data beside the checkout")
def test_real_interleaved_weights_have_the_logits_of_the_real_hf_folder():
    ours, theirs = (from_pretrained(REAL / f"stories260K{suffix}") for suffix in ("-meta", ""))
    tokens = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(0))
    assert (ours(tokens) - theirs(tokens)).abs().max() < 1e-5
    assert ours.config.tie_word_embeddings and ours.config.vocab_size == 512
