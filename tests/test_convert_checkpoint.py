"""Between Hugging Face's, Meta's and GGUF: the logits of transformers before and after, the tokenizer, what is refused."""

import importlib.util
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model, run_script, save_folder
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from minillama.errors import UserError
from minillama.formats.hf import from_pretrained
from minillama.formats.hf_export import save_pretrained
from minillama.tokenizer.export import tokenizer_json

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

SPECIALS = ["<|pad|>", "<|begin|>", "<|end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]
TEMPLATE = "{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}"


def byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


TOKENS = SPECIALS + byte_characters() + [merge.replace(" ", "") for merge in MERGES]


def tiny_llama(*, tied: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gguf_name(name: str) -> str:
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
    names |= {f"{p}_proj": f"attn_{p}" for p in "qkv"} | {f"{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}
    parts = name.split(".")
    block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
    return f"{block}{names[parts[-2]]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own permutation of q and k, as in its convert_hf_to_gguf.py."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: torch.nn.Module | None,
    *,
    kind: str = "F32",
    architecture: str = "llama",
    pre: str = "smollm",
    extra: dict[str, np.ndarray] | None = None,
    scaling: str | None = None,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    if scaling:
        writer.add_string("llama.rope.scaling.type", scaling)
        writer.add_rope_scaling_factor(4.0)
    if model is not None:
        config = model.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        quantisation = gguf.GGMLQuantizationType[kind]
        for name, weight in model.named_parameters():  # a tied head is not among them
            data = weight.detach().numpy()
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                data = interleaved(data, heads)
            if data.ndim == 2:
                data = gguf.quants.quantize(data, quantisation)
                writer.add_tensor(gguf_name(name), data, raw_dtype=quantisation)
            else:
                writer.add_tensor(gguf_name(name), data)
        for name, data in (extra or {}).items():
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(source: Path, target: Path, dtype: str = "bfloat16") -> torch.nn.Module:
    tool.convert_checkpoint(source, target, dtype=dtype)
    assert sorted(target.parent.iterdir()) == sorted([source, target])  # nothing temporary is left
    return transformers.AutoModelForCausalLM.from_pretrained(target).eval()


def refused(source: Path, target: Path) -> str:
    with pytest.raises(UserError) as error:
        tool.convert_checkpoint(source, target)
    return str(error.value)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_same_weights(tmp_path, tied, kind):
    model = tiny_llama(tied=tied)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:  # rows keep their blocks under llama.cpp's permutation, so this is exact
                quantisation = gguf.GGMLQuantizationType[kind]
                data = gguf.quants.quantize(weight.numpy(), quantisation)
                weight.copy_(torch.from_numpy(gguf.quants.dequantize(data, quantisation)))
    write_gguf(tmp_path / "tiny.gguf", model, kind=kind)
    again = converted(tmp_path / "tiny.gguf", tmp_path / "tiny", "float32")
    tokens = torch.randint(len(TOKENS), (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)
    assert again.config.tie_word_embeddings is tied
    for name in ("head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "vocab_size"):
        assert getattr(again.config, name) == getattr(model.config, name)
    with safe_open(tmp_path / "tiny" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}
        assert file.metadata() == {"format": "pt"}


def test_the_permutation_matters(tmp_path):
    """The test above would fail without it: the interleaved rows as they are give other logits."""
    model = tiny_llama(tied=True)
    tokens = torch.randint(len(TOKENS), (1, 40))
    with torch.no_grad():
        before = model(tokens).logits
        for layer in model.model.layers:
            for projection, heads in ((layer.self_attn.q_proj, 4), (layer.self_attn.k_proj, 2)):
                projection.weight.copy_(torch.from_numpy(interleaved(projection.weight.numpy(), heads)))
        assert (model(tokens).logits - before).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(tmp_path, dtype):
    model = tiny_llama(tied=True)
    write_gguf(tmp_path / "tiny.gguf", model)
    converted(tmp_path / "tiny.gguf", tmp_path / "tiny", dtype)
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["torch_dtype"] == dtype
    with safe_open(tmp_path / "tiny" / "model.safetensors", "pt") as file:
        got = file.get_tensor("model.layers.1.self_attn.k_proj.weight")
    expected = model.model.layers[1].self_attn.k_proj.weight.detach().to(getattr(torch, dtype))
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_tokenizer(tmp_path, pre):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), pre=pre)
    converted(tmp_path / "tiny.gguf", tmp_path / "tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny")

    def pieces(text):
        return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))

    begin = ["<|begin|>"] if pre == "llama-bpe" else []  # llama.cpp's default for it
    assert pieces("hello who") == [*begin, "hello", "Ġw", "h", "o"]
    assert pieces("<|end|>hello") == [*begin, "<|end|>", "hello"]
    text = "hello 2025 wörld's\n\n  \tend é"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|begin|>hello<|end|>"
    backend = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab 1234")
    digits = [piece for piece, _ in backend if piece.strip("Ġ").isdigit()]
    assert digits == (["1", "2", "3", "4"] if pre == "smollm" else ["123", "4"])


LLAMA2 = Path(__file__).resolve().parents[2] / "shared/data/tokenizers/llama2/tokenizer.model"


@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.skipif(not LLAMA2.exists(), reason="data"))]
)
def test_sentencepiece_tokenizer(tmp_path, real):
    """The same ids as the model that GGUF's pieces, scores and types were taken from, as llama.cpp's converter does."""
    import sentencepiece

    from minillama.tokenizer.tokenizer import load_tokenizer

    texts = [
        "the quick brown fox jumps over the lazy dog",
        "  two spaces, then 12 34",
        "",
        "wörld's é\n\ttab 汉字 😀 a",
    ]
    if real:
        original = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2))
    else:
        original = sentencepiece.SentencePieceProcessor(model_proto=trained_sentencepiece(texts))
    ids = range(original.get_piece_size())

    def kind(id_):
        tests = {2: original.is_unknown, 3: original.is_control, 5: original.is_unused, 6: original.is_byte}
        return next((number for number, is_it in tests.items() if is_it(id_)), 1)

    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(id_) for id_ in ids],
        "tokenizer.ggml.scores": [original.get_score(id_) for id_ in ids],
        "tokenizer.ggml.token_type": [kind(id_) for id_ in ids],
        "tokenizer.ggml.bos_token_id": original.bos_id(),
        "tokenizer.ggml.eos_token_id": original.eos_id(),
        "tokenizer.ggml.unknown_token_id": original.unk_id(),
        "llama.context_length": 128,
    }
    model, config = tool.read_tokenizer(fields)
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    for text in texts:
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == original.decode(original.encode(text))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(model)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*texts, "<s>the</s> fox  a", "   ", "\na\n", "<0x0A>"):
        assert (
            theirs.encode(text) == tokenizer.encode(text, bos=True) == load_tokenizer(tmp_path).encode(text, bos=True)
        )
        if "<s>" not in text:
            assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert (config["bos_token"], config["eos_token"], config["add_bos_token"]) == ("<s>", "</s>", True)


def trained_sentencepiece(texts: list[str], **settings: Any) -> bytes:
    import io

    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20),
        model_writer=trained,
        **{
            "model_type": "bpe",
            "vocab_size": 330,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "character_coverage": 0.98,
            "minloglevel": 2,
        }
        | settings,
    )
    return trained.getvalue()


@pytest.mark.parametrize("settings", [{}, {"remove_extra_whitespaces": True}, {"add_dummy_prefix": False}], ids=str)
def test_a_meta_folders_sentencepiece_tokenizer_is_right_in_transformers(tmp_path, settings):
    """Converted, or saved after a fine-tuning: the ids of sentencepiece itself."""
    import sentencepiece

    texts = ["the quick brown fox jumps over the lazy dog", "wörld's é\n\ttab 汉字 😀 a", "a  b", "  two   spaces, 12 "]
    content = trained_sentencepiece(texts, **settings)
    source = save_folder(random_model(), tmp_path / "hf")
    (source / "tokenizer.model").write_bytes(content)
    tool.convert_checkpoint(source, tmp_path / "meta")
    tool.convert_checkpoint(tmp_path / "meta", tmp_path / "back")
    save_pretrained(from_pretrained(tmp_path / "meta"), tmp_path / "saved", tmp_path / "meta")
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    for folder in ("back", "saved"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        for text in (*texts, "   ", "", "\na\n", "<0x0A>"):
            assert tokenizer.encode(text) == [1, *original.encode(text)], text
            assert tokenizer.decode(original.encode(text)) == original.decode(original.encode(text)), text
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    other = {"normalization_rule_name": "nfkc"}
    assert tokenizer_json(trained_sentencepiece(texts, **other)) is None


def llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """As llama.cpp computes rope_freqs for Llama 3.1: no transformers function returns the divisors."""
    divisors = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling(tmp_path, factor):
    model = tiny_llama(tied=True)
    divisors = llama3_divisors(32, 5000.0, factor)
    assert divisors.min() == 1 and divisors.max() == factor and len(np.unique(divisors)) > 2  # all three branches
    write_gguf(tmp_path / "tiny.gguf", model, extra={"rope_freqs.weight": divisors})
    again = converted(tmp_path / "tiny.gguf", tmp_path / "tiny")
    plain = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, plain / torch.from_numpy(divisors))
    assert again.config.rope_parameters["rope_type"] == "llama3"
    assert again.config.rope_parameters["factor"] == factor


def test_linear_rope_scaling(tmp_path):
    model = tiny_llama(tied=True)
    write_gguf(tmp_path / "tiny.gguf", model, scaling="linear")
    again = converted(tmp_path / "tiny.gguf", tmp_path / "tiny")
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq / 4)


def test_refusals(tmp_path):
    source, target = tmp_path / "tiny.gguf", tmp_path / "tiny"
    assert "no such file" in refused(source, target)
    source.write_bytes(b"not a model")
    assert f"{source} is not a GGUF file" in refused(source, target)
    source.write_bytes(b"GGUF\x03")
    assert "damaged" in refused(source, target)
    write_gguf(source, tiny_llama(tied=True))
    content = source.read_bytes()
    for part in (1000, len(content) // 2, len(content) - 1):
        source.write_bytes(content[:part])
        assert f"{source} is a truncated or damaged GGUF file" in refused(source, target), part
    array, numbers = struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q3sI", 3, b"a.b", 9), struct.pack("<IQ", 0, 2**60)
    for value in (numbers, struct.pack("<IQ", 9, 1) * 2000 + numbers):  # a long list, and lists in lists
        source.write_bytes(b"GGUF" + array + value)
        assert f"{source} is a truncated or damaged GGUF file" in refused(source, target)
    write_gguf(source, None, architecture="qwen2")
    assert "'qwen2'" in refused(source, target)
    write_gguf(source, tiny_llama(tied=True), pre="deepseek-llm")
    assert "'deepseek-llm'" in refused(source, target)
    write_gguf(source, tiny_llama(tied=True), scaling="yarn")
    assert "'yarn'" in refused(source, target)
    write_gguf(source, tiny_llama(tied=True), extra={"rope_freqs.weight": np.full(16, 3.0, np.float32)})
    assert "rope_freqs.weight" in refused(source, target)
    write_gguf(source, tiny_llama(tied=True), extra={"blk.0.attn_q.bias": np.zeros(128, np.float32)})
    assert "blk.0.attn_q.bias" in refused(source, target)
    assert sorted(tmp_path.iterdir()) == [source]  # nothing half-written


def test_the_target_is_never_overwritten(tmp_path):
    source, target = tmp_path / "tiny.gguf", tmp_path / "tiny"
    write_gguf(source, tiny_llama(tied=True))
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert f"{target} exists already" in refused(source, target)
    (target / "notes.txt").unlink()
    converted(source, target)  # an empty folder will do


def test_the_command(tmp_path):
    source, target = tmp_path / "tiny.gguf", tmp_path / "new" / "tiny"
    write_gguf(source, tiny_llama(tied=True))
    command = [TOOL, source, target, "--dtype", "float16"]
    codes, text = run_script(*command, log=tmp_path / "log")
    assert codes == [0], text
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "float16"
    codes, text = run_script(*command, log=tmp_path / "log")
    assert codes == [1]
    assert text == f"error: {target} exists already; name another target, or remove it first\n"


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_to_metas_format_and_back(tmp_path, monkeypatch, tied, files):
    source = save_folder(random_model(tie_word_embeddings=tied).bfloat16(), tmp_path / "hf", tie_word_embeddings=tied)
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    tool.convert_checkpoint(source, tmp_path / "meta", files=files)
    names = {"params.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"}
    assert {p.name for p in (tmp_path / "meta").iterdir()} == names | {f"consolidated.0{n}.pth" for n in range(files)}

    monkeypatch.setattr("minillama.formats.hf_export.MAX_FILE_BYTES", 40_000)
    monkeypatch.setattr("minillama.formats.hf_export.WRITE_BYTES", 500)
    tool.convert_checkpoint(tmp_path / "meta", tmp_path / "back")
    parts = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(parts) > 1 and parts[0].name == f"model-00001-of-{len(parts):05}.safetensors"
    expected, found = load_file(source / "model.safetensors"), {}
    for part in parts:
        assert part.stat().st_size < 42_000
        found |= load_file(part)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == torch.bfloat16 for name in found)
    for name in ("tokenizer.model", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()

    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    tokens = torch.arange(20)[None]
    ours = from_pretrained(source, dtype=torch.float32)
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-4)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (256, 257)


@pytest.mark.parametrize("way", ["to meta", "to hf"])
def test_another_dtype_and_another_tokenizer(tmp_path, way):
    source = save_folder(random_model(), tmp_path / "hf")
    if way == "to hf":
        tool.convert_checkpoint(source, tmp_path / "meta")
        source = tmp_path / "meta"
    other = save_folder(random_model(), tmp_path / "other")
    (other / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes() + b"\n")
    tool.convert_checkpoint(source, tmp_path / "out", dtype="float16", tokenizer=other)
    for name, tensor in from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, random_model().state_dict()[name].half())
    assert (tmp_path / "out" / "tokenizer.model").read_bytes().endswith(b"\n\n")


def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path):
    source = save_folder(random_model(), tmp_path / "hf")
    tool.convert_checkpoint(source, tmp_path / "meta", files=2)
    (tmp_path / "meta/consolidated.01.pth").unlink()
    with pytest.raises(UserError, match=r"holds 1 consolidated files with 1/2 of the weights .* there must be 2"):
        tool.convert_checkpoint(tmp_path / "meta", tmp_path / "out")
    tool.convert_checkpoint(source, tmp_path / "short", files=2)
    part = torch.load(tmp_path / "short/consolidated.01.pth")
    part["layers.1.feed_forward.w1.weight"] = part["layers.1.feed_forward.w1.weight"][:-1].clone()
    torch.save(part, tmp_path / "short/consolidated.01.pth")
    with pytest.raises(
        UserError, match=r"01.pth has another shape than consolidated.00.pth of layers.1.feed_forward.w1"
    ):
        tool.convert_checkpoint(tmp_path / "short", tmp_path / "out")
    content = (source / "model.safetensors").read_bytes()  # load_file would map the file that is written over below
    tensors, missing = load(content), "model.layers.1.mlp.up_proj.weight"
    for changed, message in (
        ({name: tensor for name, tensor in tensors.items() if name != missing}, f"{missing} is missing"),
        (tensors | {"model.layers.3.mlp.up_proj.weight": torch.ones(2)}, "layers.3.mlp.up_proj.weight is not part"),
    ):
        save_file(changed, source / "model.safetensors")
        with pytest.raises(UserError, match=message):
            tool.convert_checkpoint(source, tmp_path / "out")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles"):
        tool.convert_checkpoint(source, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_what_is_not_converted(tmp_path):
    source = save_folder(random_model(), tmp_path / "hf")
    with pytest.raises(UserError, match=r"hf/new is in .*hf, which is read"):
        tool.convert_checkpoint(source, source / "new")
    (tmp_path / "run/checkpoints/step-00000010").mkdir(parents=True)
    with pytest.raises(UserError, match=r"give one of them, the newest is .*step-00000010"):
        tool.convert_checkpoint(tmp_path / "run/checkpoints", tmp_path / "out")
    shutil.rmtree(tmp_path / "run")
    for arguments, message in (
        (({"tokenizer": source / "config.json"}), "config.json: holds no tokenizer"),
        (({"tokenizer": tmp_path}), "no tokenizer.json or tokenizer.model"),
        (({"files": 3}), "--files 3: n_kv_heads 2 is not a multiple"),
        (({"files": 0}), "--files 0"),
        (({"tokenizer": tmp_path / "none"}), "none: no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            tool.convert_checkpoint(source, tmp_path / "out", **arguments)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        tool.convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is no model folder"):
        tool.convert_checkpoint(tmp_path / "empty", tmp_path / "out")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read, it may be truncated"):
        tool.convert_checkpoint(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "hf"]  # nothing half-written
