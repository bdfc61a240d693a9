"""NF4 and int8 against their papers written out in float64, and against bitsandbytes where it is installed."""

import json
import re
import shutil
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from conftest import random_model, run_ranks, run_script, save_folder
from safetensors.torch import load_file, save_file
from test_lora import trainable
from test_merge import tool
from test_precision import SLOW_BF16, remember
from torch import nn
from torch.distributed.tensor import DTensor

from minillama.adapters.lora import LoraConfig, apply_lora, merge_lora
from minillama.adapters.peft import load_adapter
from minillama.errors import UserError
from minillama.formats.hf import check_weights, from_pretrained, load_weights, read_config
from minillama.formats.hf_export import save_pretrained, write_model
from minillama.formats.quantized import QuantizingWeights, quantize_base
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.model.quant import (
    BLOCK,
    NF4,
    OUTER,
    QuantizedLinear,
    apply_quantization,
    dynamic_levels,
    quantized_layers,
    shapes,
)
from minillama.parallel.initialise import materialise
from minillama.parallel.sharding import FsdpConfig, local, set_dtypes, shard

RECIPES = Path(__file__).parents[1] / "recipes"
WIDE = {"hidden_size": 192, "intermediate_size": 320}
"""Rows of 3 and 5 blocks: 256 scales end within a row."""


def linear(out=96, width=320, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(width, out, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer.requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(random_model(**WIDE), tmp_path_factory.mktemp("wide"), **WIDE)


def test_the_levels_are_those_of_the_papers():
    """NF4: quantiles of a normal distribution, 8 of the positive and 7 of the negative half and 0, over the largest."""
    largest = 1 - (1 / 32 + 1 / 30) / 2
    quantiles = [[NormalDist().inv_cdf(p) for p in np.linspace(largest, 0.5, n)[:-1]] for n in (9, 8)]
    levels = np.array(sorted([*quantiles[0], 0.0, *(-q for q in quantiles[1])])) / max(quantiles[0])
    assert np.abs(levels - NF4).max() < 1e-6
    scale_levels = np.array(dynamic_levels())
    assert len(set(scale_levels)) == 256 and scale_levels[-1] == 1 and 0 in scale_levels
    # of each power of ten from 1e-7 on twice as many as of the one below, of each sign, evenly
    for power in range(7):
        own = scale_levels[(scale_levels > 10.0 ** (power - 7)) & (scale_levels < 10.0 ** (power - 6))]
        assert len(own) == 2**power
        assert np.allclose(np.diff(own), 0.9 * 10.0 ** (power - 6) / 2**power)


def reference_nf4(weight):
    """(codes, codes of the scales, weights) of a matrix: the paper's equations 1 and 5, in float64, one block at a time."""
    flat, levels, scale_levels = weight.double().numpy().ravel(), np.array(NF4), np.array(dynamic_levels())

    def nearest(value, table):
        return int(np.abs(table - value).argmin())

    scales = np.array([np.abs(flat[i : i + BLOCK]).max() for i in range(0, len(flat), BLOCK)])
    codes = [nearest(value / scales[i // BLOCK], levels) for i, value in enumerate(flat)]
    centred = scales - scales.mean()
    outer = [np.abs(centred[i : i + OUTER]).max() for i in range(0, len(scales), OUTER)]
    scale_codes = [nearest(value / outer[i // OUTER], scale_levels) for i, value in enumerate(centred)]
    decoded = [scale_levels[code] * outer[i // OUTER] + scales.mean() for i, code in enumerate(scale_codes)]
    values = np.array([levels[code] * decoded[i // BLOCK] for i, code in enumerate(codes)])
    return np.array(codes), np.array(scale_codes), values.reshape(weight.shape)


def parts(layer):
    """Codes of the weights and of the scales, one by one."""
    packed, width = layer.weight.view(torch.uint8), layer.in_features
    codes = packed[:, : width // 2]
    codes = torch.stack((codes >> 4, codes & 15), -1).flatten()
    return codes.numpy(), packed[:, width // 2 :][:, : width // BLOCK].flatten().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_the_papers(dtype):
    plain = linear().to(dtype)
    layer = QuantizedLinear(plain, "nf4")
    codes, scale_codes, values = reference_nf4(plain.weight)
    own_codes, own_scale_codes = parts(layer)
    assert (own_codes != codes).sum() == 0 and (own_scale_codes != scale_codes).sum() == 0
    assert np.abs(layer.base_weight().double().numpy() - values).max() < 1e-8
    assert layer.base_weight().sub(plain.weight).norm() < 0.1 * plain.weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_absmax_of_each_row(dtype):
    plain = linear().to(dtype)
    layer = QuantizedLinear(plain, "int8")
    weight, found = plain.weight.double().numpy(), layer.base_weight().double().numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 127
    tie = np.abs(weight / scale % 1 - 0.5) < 1e-4  # which of two codes as near is taken may differ
    assert np.abs(found - np.rint(weight / scale) * scale)[~tie].max() < 1e-8
    assert (np.abs(found - weight) < 0.5001 * scale).all() and tie.mean() < 0.01


def test_rows_of_zeros_stay_zeros():
    plain = linear()
    plain.weight[3] = 0
    for kind in ("nf4", "int8"):
        assert not QuantizedLinear(plain, kind).base_weight()[3].any()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_input_gradient_are_those_of_the_dequantised_weight(kind, dtype):
    layer = QuantizedLinear(linear(), kind)
    weight = layer.base_weight().to(dtype)  # rounded once
    x = torch.randn(2, 7, 320, dtype=dtype, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert all(t.dtype != dtype or t.numel() < weight.numel() for t in saved)  # W is not kept for the backward
    assert torch.equal(y, x @ weight.T)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(y) @ weight)
    assert layer.weight.grad is None and layer.to(torch.bfloat16).weight.dtype == torch.uint8


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "mlp"), [(576, 9, 3, 1536), (2048, 32, 8, 8192), (16384, 128, 8, 53248)]
)
def test_bytes_of_a_block_of_smollm2_and_of_the_smallest_and_largest_llama_3(hidden, heads, kv_heads, mlp):
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = LlamaConfig(**sizes, intermediate_size=mlp, num_hidden_layers=1)
    for kind, limit in (("nf4", 0.53), ("int8", 1.01)):
        with torch.device("meta"):
            model = apply_quantization(Llama(config), kind)
        layers = quantized_layers(model)
        weights = sum(shapes(model)[name].numel() for name in layers)
        assert 0.5 * weights < sum(layer.nbytes for layer in layers.values()) <= limit * weights


def test_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for dtype in (torch.float32, torch.bfloat16):
        plain = linear(192, 576).to(dtype)
        layer = QuantizedLinear(plain, "nf4")
        codes, state = functional.quantize_4bit(plain.weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        _, scale_codes = parts(layer)
        assert (layer.weight[:, :288].flatten() == codes.flatten()).all()
        torch.testing.assert_close(layer.outer, state.state2.absmax, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.scale_levels, state.state2.code, rtol=0, atol=1e-7)
        assert (scale_codes != state.absmax.numpy()).mean() < 0.01
    half = linear(192, 576).half()
    codes, scales, _ = functional.int8_vectorwise_quant(half.weight)
    layer = QuantizedLinear(half.float(), "int8")
    assert torch.equal(layer.weight[:, :576].view(torch.int8), codes)
    torch.testing.assert_close(
        layer.base_weight(), functional.int8_vectorwise_dequant(codes, scales), rtol=1e-6, atol=0
    )


# --- Folders


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_folder_is_what_quantising_while_loading_gives(folder, tmp_path, kind):
    write_model(
        QuantizingWeights(check_weights(empty(folder), folder), kind), read_config(folder), tmp_path / "plain", folder
    )
    write_model(check_weights(empty(folder), folder), read_config(folder), tmp_path / kind, folder, quantize=kind)
    models = [
        from_pretrained(folder, quantize=kind),
        from_pretrained(tmp_path / kind),
        from_pretrained(tmp_path / "plain"),
    ]
    tokens = torch.randint(0, 512, (2, 30))
    expected = models[2](tokens)
    for model in models[:2]:
        assert len(quantized_layers(model)) == 3 * 7
        assert torch.equal(model(tokens), expected)
    # the whole matrix at once, as a layer that is quantised in place
    real = apply_quantization(random_model(**WIDE), kind)
    assert torch.equal(real(tokens), expected)
    sizes = [sum(f.stat().st_size for f in (tmp_path / k).glob("*.safetensors")) for k in (kind, "plain")]
    assert sizes[0] < sizes[1]
    tensors = load_file(tmp_path / kind / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert tensors[name].dtype == (torch.uint8 if kind == "nf4" else torch.int8)
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32


def empty(folder):
    with torch.device("meta"):
        return Llama(read_config(folder)).requires_grad_(False)


def test_a_bitsandbytes_folder_whose_scales_are_plain(folder, tmp_path):
    """As transformers writes it by default: bnb_4bit_use_double_quant is false."""
    base, tensors = random_model(**WIDE), {}
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "_proj" not in name:
                tensors[name] = parameter.data
                continue
            blocks = parameter.data.view(-1, BLOCK)
            scales = blocks.abs().amax(1)
            codes = (blocks / scales[:, None])[..., None].sub(torch.tensor(NF4)).abs().argmin(-1).view(-1, 2)
            parameter.copy_(torch.tensor(NF4)[codes].view(-1, BLOCK).mul(scales[:, None]).view_as(parameter))
            state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(parameter.shape)}
            tensors[name] = (codes[:, :1] << 4 | codes[:, 1:]).to(torch.uint8)
            tensors[f"{name}.absmax"], tensors[f"{name}.quant_map"] = scales, torch.tensor(NF4)
            text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
            tensors[f"{name}.quant_state.bitsandbytes__nf4"] = text
    save_folder(base, tmp_path, **WIDE, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    save_file(tensors, tmp_path / "model.safetensors")
    tokens = torch.randint(0, 512, (2, 30))
    torch.testing.assert_close(from_pretrained(tmp_path)(tokens), base(tokens), rtol=1e-6, atol=1e-6)


def test_bitsandbytes_reads_our_folders_and_we_read_its(folder, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    base, tensors = random_model(**WIDE), {}
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "_proj" not in name:
                tensors[name] = parameter.data
                continue
            tensors[name], state = functional.quantize_4bit(
                parameter.data, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            tensors |= {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
            parameter.copy_(functional.dequantize_4bit(tensors[name], state))
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    save_folder(base, tmp_path / "theirs", **WIDE, quantization_config=settings | {"quant_method": "bitsandbytes"})
    save_file(tensors, tmp_path / "theirs/model.safetensors")
    for name, layer in quantized_layers(from_pretrained(tmp_path / "theirs")).items():
        torch.testing.assert_close(layer.base_weight(), base.get_parameter(name).data, rtol=1e-6, atol=0, msg=name)

    write_model(check_weights(empty(folder), folder), read_config(folder), tmp_path / "ours", folder, quantize="nf4")
    tensors = load_file(tmp_path / "ours/model.safetensors")
    for name, layer in quantized_layers(from_pretrained(tmp_path / "ours")).items():
        given = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(given, device=torch.device("cpu"))
        found = functional.dequantize_4bit(tensors[name], state)
        torch.testing.assert_close(layer.base_weight(), found, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"bits": 4}, "bits"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage"),
        ("nf4", "no object"),
    ],
)
def test_other_quantised_folders_are_refused(tmp_path, changes, problem):
    save_folder(random_model(), tmp_path, quantization_config=changes)
    with pytest.raises(UserError, match=f"quantization_config.*{problem}.*give"):
        read_config(tmp_path)


def test_what_cannot_be_quantised(folder, tiny_folder, tmp_path):
    with pytest.raises(UserError, match=r"nf4.*32 weights.*64: quantise as int8"):
        from_pretrained(tiny_folder, quantize="nf4")
    write_model(check_weights(empty(folder), folder), read_config(folder), tmp_path / "nf4", folder, quantize="nf4")
    with pytest.raises(UserError, match=r"is quantised already, as nf4, and int8 is asked for: leave that flag out"):
        from_pretrained(tmp_path / "nf4", quantize="int8")
    tensors = load_file(tmp_path / "nf4" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    save_file(tensors, tmp_path / "nf4" / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj.weight.absmax"):
        from_pretrained(tmp_path / "nf4")


# --- LoRA on it


@pytest.mark.parametrize("config", [{}, {"rslora": True}, {"dora": True}], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lora_on_a_quantised_base_is_lora_on_what_it_dequantises_to(kind, config):
    config = LoraConfig(rank=4, dropout=0.0, targets=("all-linear",), **config)
    models = [apply_quantization(random_model(**WIDE), kind), random_model(**WIDE)]
    with torch.no_grad():
        for name, layer in quantized_layers(models[0]).items():
            models[1].get_parameter(name).copy_(layer.base_weight())
    tokens, results = torch.randint(0, 512, (2, 30)), []
    for model in models:
        apply_lora(model.requires_grad_(False), config)
        torch.manual_seed(1)
        for parameter in trainable(model).values():
            nn.init.normal_(parameter, std=0.05)
        model(tokens).logsumexp(-1).sum().backward()
        results.append({name: parameter.grad for name, parameter in trainable(model).items()})
        results[-1]["logits"] = model(tokens).detach()
        results[-1]["merged"] = merge_lora(model)(tokens).detach()
    assert results[0].keys() == results[1].keys()
    for name, found in results[0].items():
        scale = results[1][name].abs().max().item()
        torch.testing.assert_close(found, results[1][name], rtol=0, atol=1e-5 * scale, msg=name)
    logits, merged = results[0]["logits"], results[0]["merged"]
    torch.testing.assert_close(logits, merged, rtol=0, atol=1e-4 * logits.abs().max().item())


# --- On several ranks


def held_and_gathered(mesh, folder, kind, dtype):
    """Bytes that this rank holds and bytes that one block gathers, of the quantised layers; and their weights."""
    fsdp = FsdpConfig(strategy="full-shard", precision=dtype)
    model = empty(folder)
    quantize_base(model, check_weights(model, folder), kind)
    set_dtypes(model, fsdp)
    shard(model, mesh, fsdp)
    materialise(model, "cpu")
    load_weights(model, folder)
    layers = quantized_layers(model)
    held = sum(local(layer.weight).nbytes for layer in layers.values())
    block = model.model.layers[0]
    block.unshard()
    own = quantized_layers(block).values()
    assert all(not isinstance(layer.weight, DTensor) for layer in own)
    gathered = sum(layer.weight.nbytes for layer in own)
    weights = [layer.base_weight() for layer in own]
    block.reshard()
    return held, gathered, weights


@pytest.mark.parametrize(("kind", "dtype"), [("nf4", "fp32"), ("int8", "mixed")])
def test_every_number_of_ranks_has_the_same_codes_and_gathers_bytes(folder, kind, dtype):
    expected = quantized_layers(from_pretrained(folder, quantize=kind)).values()
    whole = sum(layer.weight.nbytes for layer in expected)
    for ranks in (2, 3):
        results = run_ranks(held_and_gathered, ranks, folder, kind, dtype)
        assert sum(held for held, _, _ in results) == whole
        for _, gathered, weights in results:
            assert gathered == whole // 3
            for found, layer in zip(weights, list(expected)[:7], strict=True):
                assert torch.equal(found, layer.base_weight())


# --- Runs


def test_a_run_on_a_quantised_base(folder, tmp_path, capsys):
    """Trains on two ranks, goes on from a checkpoint on one, and the adapter is what evaluation, merging and peft's format
    make of it."""
    rows = [{"dialogue": f"A: hi\nB: bye {i}", "summary": f"They part, {i}."} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = ["--data.path", tmp_path / "rows.json", "--data.val-path", tmp_path / "rows.json"]
    data += ["--data.context-length", 100, "--device", "cpu"]
    data += ["--data.cache-dir", remember(tmp_path / "cache", SLOW_BF16, "math")]  # so that all compute in fp32

    def train(model, out, *flags, world_size=1):
        flags = ["--model", model, "--output-dir", tmp_path / out, *data, "--fsdp.precision", "fp32", *flags]
        flags += ["--train.batch-size", 1, "--train.accumulate", 2 // world_size, "--train.max-steps", 4]
        flags += ["--train.epochs", 9, "--checkpoint.every", 2, "--checkpoint.keep", 0, "--lora.dropout", 0]
        flags += ["--lora.targets", "all-linear", "--lora.plus-ratio", 4, "--optim.lr", 3e-3]
        codes, text = run_script(RECIPES / "lora_fsdp.py", *flags, world_size=world_size, log=tmp_path / "log")
        return codes[0], text

    code, text = train(folder, "out", "--lora.quantize", "nf4", "--fsdp.strategy", "full-shard", world_size=2)
    assert code == 0, text
    assert "21 linear layers in nf4" in text
    assert text.count(f"--adapter {tmp_path}/out/adapter --quantize nf4 ") == 2  # to generate and to evaluate next
    checkpoint = tmp_path / "out/checkpoints/step-00000002"
    code, text = train(folder, "other", "--lora.quantize", "int8", "--resume", checkpoint)
    assert code == 1 and "--lora.quantize int8 (was nf4)" in text
    code, text = train(folder, "again", "--lora.quantize", "nf4", "--resume", checkpoint)
    assert code == 0, text
    first, again = (load_file(tmp_path / out / "adapter/adapter_model.safetensors") for out in ("out", "again"))
    for name, tensor in first.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-5, msg=name)

    weights, config, adapter = check_weights(empty(folder), folder), read_config(folder), tmp_path / "out/adapter"
    write_model(weights, config, tmp_path / "nf4", folder, quantize="nf4")
    flags = [
        "--model",
        tmp_path / "nf4",
        "--adapter",
        adapter,
        *data,
        "--dtype",
        "fp32",
        "--output",
        tmp_path / "found.json",
    ]
    codes, text = run_script(RECIPES / "evaluate.py", *flags, log=tmp_path / "log")
    assert codes == [0], text
    found = json.loads((tmp_path / "found.json").read_text())["results"]["adapted"]["eval_loss"]
    lines = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.1 and found == pytest.approx(losses[-1], abs=1e-5)

    capsys.readouterr()
    assert tool("merge_lora", folder, adapter, tmp_path / "plain", "--held-out-tokens", 100_000) == 0
    assert tool("merge_lora", folder, adapter, tmp_path / "dequantised", "--from-quantized", "nf4") == 0
    told = re.findall(r"^  (\d\.\d{4})  .*?(?:\((.*)\))?$", capsys.readouterr().out, re.MULTILINE)
    trained, onto_plain, again, merged, unmerged = (float(loss) for loss, _ in told)
    assert trained == again == pytest.approx(losses[-1], abs=1e-4) and merged == pytest.approx(trained, abs=2e-3)
    assert onto_plain == pytest.approx(unmerged, abs=2e-3) and abs(onto_plain - trained) > 0.005
    for loss, difference in told:
        assert float(difference or 0) == pytest.approx(float(loss) - trained, abs=2e-4)
    shutil.copytree(adapter, tmp_path / "away")
    for name, flags in (("a", ["--from-quantized", "nf4"]), ("b", []), ("c", ["--held-out-tokens", 0])):
        assert tool("merge_lora", folder, adapter if name == "c" else tmp_path / "away", tmp_path / name, *flags) == 0
        said = f"evaluate.py --model {folder} --adapter {tmp_path}/away --quantize nf4 --data.dataset"
        text = capsys.readouterr().out
        assert (said in text and "no run.json beside" in text) == (name == "a") and "trained tokens" not in text
    shutil.copytree(adapter, tmp_path / "dpo/adapter")
    run = json.loads((tmp_path / "out/run.json").read_text())
    run["flags"]["data"] |= {"dataset": "preference", "path": "p.jsonl", "val_path": None, "val_fraction": 0.1}
    (tmp_path / "dpo/run.json").write_text(json.dumps({"flags": run["flags"] | {"dpo": {"beta": 0.2}}}))
    assert tool("merge_lora", folder, tmp_path / "dpo/adapter", tmp_path / "d") == 0
    rows = r"--data.dataset preference --data.path p.jsonl --data.val-fraction 0.1 .*--dpo.beta 0.2"
    commands = re.findall(r"evaluate.py (.*)", capsys.readouterr().out)
    wanted = (
        f"--model {folder} --adapter .* --quantize nf4 {rows}",
        f"--model {tmp_path}/d {rows} --reference {folder}",
    )
    assert all(re.fullmatch(pattern, text) for pattern, text in zip(wanted, commands, strict=True)), commands
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef rows(*_):\n    return []\n")
    (tmp_path / "mixture.json").write_text(json.dumps([{"dataset": "own.py:rows"}]))
    for name, changes in {
        "e": {"dataset": f"{tmp_path}/own.py:rows"},
        "f": {"dataset": "samsum", "mixture": str(tmp_path / "mixture.json")},
    }.items():
        run["flags"]["data"] |= {"path": None} | changes
        (tmp_path / "dpo/run.json").write_text(json.dumps(run))
        assert tool("merge_lora", folder, tmp_path / "dpo/adapter", tmp_path / name) == 0
        assert (
            f"rows come from {tmp_path}/own.py:rows, and nothing that a run.json names is run"
            in capsys.readouterr().out
        )
        assert not (tmp_path / "ran").exists()
    tokens = torch.randint(0, 512, (2, 30))
    adapted = load_adapter(from_pretrained(folder, quantize="nf4"), adapter)(tokens)
    onto_plain = load_adapter(from_pretrained(folder), adapter)(tokens)
    for expected, merged in ((adapted, "dequantised"), (onto_plain, "plain")):
        torch.testing.assert_close(from_pretrained(tmp_path / merged)(tokens), expected, rtol=0, atol=1e-3)
    assert (adapted - onto_plain).abs().max() > 0.01
    with pytest.raises(UserError, match=r"is quantised, and its plain weights are gone"):
        save_pretrained(from_pretrained(tmp_path / "nf4"), tmp_path / "none", folder)
    flags = ["--model", tmp_path / "nf4", "--output-dir", tmp_path / "full", *data]
    codes, text = run_script(RECIPES / "full_fsdp.py", *flags, log=tmp_path / "log")
    assert codes != [0] and "nf4 is quantised, and its weights cannot be trained: give the plain model" in text


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiled_blocks_too(folder, kind):
    """The input gradient, the only one there is, and no weight that is kept for it."""
    layer = QuantizedLinear(linear(), kind)
    compiled = torch.compile(lambda x: layer(torch.sin(x)), fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 320, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = compiled(x)
    y.sum().backward()
    assert max(t.numel() for t in saved if t.is_floating_point()) <= x.numel()
    weight = layer.base_weight()
    torch.testing.assert_close(y, torch.sin(x) @ weight.T)
    torch.testing.assert_close(x.grad, torch.cos(x).detach() * (torch.ones_like(y) @ weight))
