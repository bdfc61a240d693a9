"""Files with random changes: each is read as transformers and peft read it, or refused by a UserError.

Nothing of it runs, nothing hangs. --whole-matrix makes thousands of changes, else some of each kind.
"""

import copy
import gc
import json
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import random_model, run_ranks, save_folder
from test_checkpoint import LORA, make_two, training
from test_convert_checkpoint import tiny_llama, tool, write_gguf
from test_index import forge
from test_tokenizer import llama3_like
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.adapters.merge import export_checkpoint
from minillama.adapters.peft import load_adapter, save_adapter
from minillama.data.cache import prepare
from minillama.data.datasets import DataConfig, Source, training_sources
from minillama.data.encoders import encode_rows
from minillama.data.rows import read_rows
from minillama.errors import UserError
from minillama.formats.hf import INDEX as WEIGHTS_INDEX
from minillama.formats.hf import from_pretrained, open_weights, read_config, weights_fingerprint
from minillama.formats.hf_export import save_pretrained
from minillama.formats.meta import read_meta_config, write_meta
from minillama.inference.load import find_stop_ids
from minillama.tokenizer.tokenizer import load_tokenizer
from minillama.training import resume
from minillama.training.checkpoint_index import INDEX, read_index
from minillama.training.config import RunConfig, saved_flags
from minillama.training.flag_changes import compare_flags
from minillama.training.metrics import _reopen, plot_loss
from minillama.training.plan import Progress
from minillama.training.resume import MANIFEST, find_checkpoint, hash_of


@dataclass(frozen=True)
class LoraRun(RunConfig):
    lora: LoraConfig = LORA


SECONDS = 10
"""Of computing, or thirty times as many on the clock of a busy machine: more is a hang"""
TINIER = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
"""Audit events of running something. What ranks send each other is pickled: there names lead to what runs something."""
HARMFUL = {
    "os",
    "posix",
    "subprocess",
    "sys",
    "shutil",
    "runpy",
    "importlib",
    "ctypes",
    "eval",
    "exec",
    "getattr",
    "open",
}

VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**9, 2**60, 2**70, 10**400,
    "", "x", "0", "llama", "none", "human", "assistant", "../x", "/etc/passwd", "a/b", "\x00", "\ud800", "é" * 9, "x" * 9999,
    [], [[]], {}, [None], ["human"], [1, 2], {"a": 1}, {"content": "x"}, list(range(300)), {"role": "user", "content": "Hi"},
]  # fmt: skip


def nested(depth, value=1):
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


def places(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield from places(inside, (*path, key))


def mutated(content, rng, values=()):
    """The bytes of a JSON value with one to three changes in it, or in its text."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice([*places(content)][1:] or [()])
        if not path:
            return json.dumps(rng.choice(VALUES)).encode()
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        way, key = rng.randrange(8), path[-1]
        if way == 0:
            del parent[key]
        elif way == 1 and isinstance(parent, dict):
            parent[rng.choice([str(key).upper(), "", "unknown", str(key) + "_"])] = parent.pop(key)
        elif way == 2:
            other = rng.choice([*parent] if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[other] = parent[other], parent[key]
        elif way == 3 and type(parent[key]) in (int, float):
            parent[key] = rng.choice(
                (parent[key] + 1, parent[key] * 2, parent[key] // 2, -parent[key], str(parent[key])[:99])
            )
        elif way == 4:
            parent[key] = rng.choice(([parent[key]], {"a": parent[key]}, nested(rng.choice((20, 100, 250)))))
        else:
            parent[key] = rng.choice([*VALUES, *values])
    text = json.dumps(content).encode()
    way = rng.randrange(40)
    if way == 0:
        text = text[: rng.randrange(len(text))]
    elif way == 1:
        at = rng.randrange(len(text))
        text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    elif way == 2:
        text = rng.choice(
            (
                b"",
                b"\xef\xbb\xbf" + text,
                text.decode().encode("utf-16"),
                b"[" * 900 + b"]" * 900,
                b"[" * 200_000,
                b'{"a":' * 200_000,
            )
        )
    return text


class Hang(BaseException):
    pass


ran = []
watching = False


def hook(event, args):
    harmful = event == "pickle.find_class" and ({args[0].partition(".")[0], args[1]} & HARMFUL or "." in args[1])
    if watching and (harmful or event.startswith(FORBIDDEN)):
        ran.append((event, str(args)[:200]))


@contextmanager
def watched():
    """Ends what hangs, and notes what runs."""
    global watching

    def alarm(number, frame):
        raise Hang

    if not getattr(watched, "hooked", False):
        sys.addaudithook(hook)
        watched.hooked = True
    clocks = (signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, 30 * SECONDS)
    for number, clock, seconds in clocks:
        signal.signal(number, alarm)
        signal.setitimer(clock, seconds)
    watching = True
    try:
        yield
    finally:
        watching = False
        for _, clock, _ in clocks:
            signal.setitimer(clock, 0)


def fuzz(count, seed, change, read, compare=None, first=0):
    """Makes `count` changes: change(rng) -> what to show if it goes wrong; read() must return, or raise UserError;
    compare(what read returned) -> None, or what is different. How often each came out."""
    assert compare is None or compare(read()) is None, "unchanged, it is not what the reference reads"
    outcomes, wrong = Counter(), []
    for number in range(first, first + count):
        rng = random.Random(f"{seed} {number}")
        shown = change(rng)
        try:
            with watched():
                result = read()
        except UserError as error:
            outcomes["refused"] += 1
            assert str(error)
        except Hang:
            wrong.append((number, "HANG", shown))
        except BaseException:
            wrong.append((number, traceback.format_exc(limit=-4), shown))
        else:
            difference = compare(result) if compare else None
            outcomes["read" if difference is None else "read, refused by the reference"] += 1
            if difference:
                wrong.append((number, difference, shown))
        if ran:
            wrong.append((number, f"RUNS {ran}", shown))
            ran.clear()
        if number % 50 == 0:
            gc.collect()
    text = "\n".join(f"--- {seed} {n}: {what}\n{str(shown)[:600]}" for n, what, shown in wrong[:25])
    assert not wrong, f"{len(wrong)} of {count} ({dict(outcomes)}):\n{text}"
    print(f"{seed}: {count} changes, {dict(outcomes)}")
    return outcomes


@pytest.fixture
def count(request):
    return lambda few, many: many if request.config.getoption("--whole-matrix") else few


@pytest.fixture(autouse=True)
def quiet():
    """The references warn of much that is refused here."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


TOKENS = torch.arange(12).view(1, 12) * 5 % 64
REFUSED = ""
"""What a comparison gives where the reference does not read it at all"""


def logits_of(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS).logits


def differs(found, reference):
    """None if the same; the reference is called."""
    try:
        with watched():
            expected = reference()
    except (Exception, Hang):
        return REFUSED
    if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True):
        return None
    return f"differs by {(found - expected).abs().max() if found.shape == expected.shape else found.shape}"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model in two files with an index."""
    import minillama.formats.hf

    plain = save_folder(random_model(**TINIER), tmp_path_factory.mktemp("plain"), **TINIER)
    before, minillama.formats.hf_export.MAX_FILE_BYTES = minillama.formats.hf_export.MAX_FILE_BYTES, 12_000
    folder = tmp_path_factory.mktemp("small") / "model"
    save_pretrained(from_pretrained(plain), folder, plain)
    minillama.formats.hf_export.MAX_FILE_BYTES = before
    assert (folder / WEIGHTS_INDEX).exists()
    return folder


CONFIG_VALUES = [4, 16, 24, 64, "silu", "gelu", ["LlamaForCausalLM"], "mistral", 1e-3, 1e9, 500000.0]
MORE_CONFIG = {
    "head_dim": 4,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


def run_model(folder):
    with torch.no_grad():
        return from_pretrained(folder, dtype=torch.float32)(TOKENS)


def test_config(small, tmp_path, count):
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    content = json.loads((folder / "config.json").read_text()) | MORE_CONFIG

    def change(rng):
        text = mutated(content, rng, CONFIG_VALUES)
        (folder / "config.json").write_bytes(text)
        return text

    outcomes = fuzz(
        count(40, 700),
        "config",
        change,
        lambda: run_model(folder),
        lambda found: differs(found, lambda: logits_of(folder)),
    )
    assert len(outcomes) > 1


def test_weights_index(small, tmp_path, count):
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    content = json.loads((folder / WEIGHTS_INDEX).read_text())
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "x.safetensors")
    values = ["../x.safetensors", str(tmp_path / "x.safetensors"), *sorted(file.name for file in folder.iterdir())]

    def change(rng):
        text = mutated(content, rng, values)
        (folder / WEIGHTS_INDEX).write_bytes(text)
        return text

    fuzz(
        count(20, 300),
        "index",
        change,
        lambda: run_model(folder),
        lambda found: differs(found, lambda: logits_of(folder)),
    )


def test_meta_params(small, tmp_path, count):
    folder = tmp_path / "meta"
    folder.mkdir()
    write_meta(open_weights(small), read_config(small), folder)
    content = json.loads((folder / "params.json").read_text()) | {"rope_scaling_factor": 8, "use_scaled_rope": False}
    before = run_model(folder)

    def change(rng):
        text = mutated(content, rng, [4, 16, 24])
        (folder / "params.json").write_bytes(text)
        read_meta_config.cache_clear()
        return text

    def compare(found):
        return None if found.shape == before.shape else "another shape"

    fuzz(count(20, 200), "params", change, lambda: run_model(folder), compare)


TEXTS = ["Once upon a time", " a  b\n\n1234 Größe", "<|begin_of_text|>x<|eot_id|> y", "added_one x"]


def test_tokenizer_config(small, tmp_path, count):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    llama3_like().save(str(folder / "tokenizer.json"))
    content = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end_of_text|>", "lstrip": False, "special": True},
        "pad_token": "<|eot_id|>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {},
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endfor %}",
    }
    files = {"tokenizer_config.json": content, "special_tokens_map.json": {"eos_token": "<|eot_id|>"}}
    files |= {"added_tokens.json": {"added_one": 700}, "generation_config.json": {"eos_token_id": [1, 2]}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(content))

    def change(rng):
        for file in files:
            (folder / file).unlink(missing_ok=True)
        name = rng.choice([*files, *["tokenizer_config.json"] * 4])
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
        text = mutated(files[name], rng, ["<|eot_id|>", "h", 600, 601])
        (folder / name).write_bytes(text)
        return name, text

    def read():
        tokenizer = load_tokenizer(folder)
        ids = [tokenizer.encode(text) for text in TEXTS]
        assert [tokenizer.decode(one) for one in ids]
        try:
            chat = tokenizer.chat_text(messages[:1]), tokenizer.encode_chat(messages)
        except UserError:
            chat = None
        find_stop_ids(tokenizer, folder)
        return ids, tokenizer.bos_id, tokenizer.eos_id, chat and chat[0]

    def compare(found):
        try:
            reference = AutoTokenizer.from_pretrained(folder)
            chat = found[3] and reference.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
            ids = [reference.encode(text, add_special_tokens=False) for text in TEXTS]
            expected = ids, reference.bos_token_id, reference.eos_token_id, chat
        except Exception:
            return REFUSED
        return None if found == expected else f"{found} is not {expected}"

    fuzz(count(30, 400), "tokenizer", change, read, compare)


def test_adapter_config(small, tmp_path, count):
    base = from_pretrained(small, dtype=torch.float32)
    config = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
    model = apply_lora(from_pretrained(small), config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    folder = tmp_path / "adapter"
    save_adapter(model, folder, config, str(small))
    content = json.loads((folder / "adapter_config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)

    def change(rng):
        text = mutated(
            content, rng, ["LORA", "ADAPTION_PROMPT", "all", "all-linear", "q_proj", ["q_proj", "down_proj"], 4, 16]
        )
        (folder / "adapter_config.json").write_bytes(text)
        return text

    def read():
        with torch.no_grad():
            return load_adapter(copy.deepcopy(base), folder)(TOKENS)

    def reference():
        with torch.no_grad():
            return peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()(TOKENS).logits

    fuzz(count(20, 300), "adapter", change, read, lambda found: differs(found, reference))


def test_tokenizer_json(tmp_path, count):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    llama3_like().save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text())
    sizes = {"vocab": content["model"].pop("vocab"), "merges": content["model"].pop("merges")}

    def change(rng):
        changed = mutated(content, rng, ["BPE", "ByteLevel", "Isolated", 480])
        try:  # most changes are of the settings, not of one token of many
            value = json.loads(changed)
            whole = mutated(sizes, rng) if rng.randrange(4) == 0 else json.dumps(sizes).encode()
            value["model"] |= json.loads(whole)
            changed = json.dumps(value).encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        (folder / "tokenizer.json").write_bytes(changed)
        return changed

    def compare(found):
        try:
            reference = AutoTokenizer.from_pretrained(folder)
            expected = [reference.encode(text, add_special_tokens=False) for text in TEXTS]
        except BaseException:  # pyo3's panics too
            return REFUSED
        return None if found == expected else f"{found} is not {expected}"

    def read():
        tokenizer = load_tokenizer(folder)
        return [tokenizer.encode(text) for text in TEXTS]

    fuzz(count(20, 300), "tokenizer.json", change, read, compare)


def test_files_of_runs(tmp_path, count, monkeypatch):
    """run.json as --config, and metrics.jsonl."""
    flags = json.loads(json.dumps(asdict(LoraRun(Path("m"), Path("o"))), default=str))
    line = {"step": 1, "epoch": 0.5, "loss": 2.0, "lr": 0.1}
    file = tmp_path / "file"
    file.write_text(json.dumps(line))
    plot_loss(file, tmp_path / "loss.png")  # which asks for fonts, once
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(file)])

    def change(rng):
        one = rng.randrange(2)
        text = mutated(line if one else {"flags": flags}, rng)
        file.write_bytes(text)
        return text

    def read():
        saved = None
        with suppress(UserError):
            saved = saved_flags(LoraRun)
        with suppress(UserError):
            plot_loss(file, tmp_path / "loss.png")
        _reopen(file, Progress(packs_per_step=1, step=3)).close()
        return saved

    fuzz(count(20, 200), "run", change, read)


def test_gguf(tmp_path, count):
    """Its bytes: mostly those of names and settings."""
    source = tmp_path / "model.gguf"
    write_gguf(source, tiny_llama(tied=False))
    content = source.read_bytes()

    def change(rng):
        changed, places = bytearray(content), []
        for _ in range(rng.choice((1, 1, 2, 8))):
            places.append(rng.randrange(rng.choice((64, 2000, 16_000, len(content)))))
            changed[places[-1]] = rng.choice((0, 1, 2, 255, rng.randrange(256)))
        source.write_bytes(changed[: rng.randrange(len(content))] if rng.randrange(20) == 0 else changed)
        shutil.rmtree(tmp_path / "target", ignore_errors=True)
        return places, [changed[place] for place in places]

    fuzz(count(15, 200), "gguf", change, lambda: tool.convert_gguf(source, tmp_path / "target", torch.float32))


ROWS = {
    "samsum": [{"dialogue": "A: hi", "summary": "They part."}],
    "alpaca": [{"instruction": "Say", "input": "it", "output": "so"}, {"instruction": "Say", "output": ""}],
    "grammar": [{"input": "He go", "target": "He goes"}],
    "chat": [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "system": "Be kind"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"prompt": "Hi", "response": "Ho", "system": None},
    ],
    "text": [{"text": "Once upon a time"}],
    "own.py": [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"text": "Once"}],
}


@pytest.mark.parametrize("dataset", ROWS)
def test_rows(tiny_folder, tmp_path, count, dataset):
    """Also what CSV and Parquet could not hold: as a line of JSONL."""
    tokenizer, file = load_tokenizer(tiny_folder), tmp_path / "rows.jsonl"
    source = Source(dataset, file, "train")

    def change(rng):
        text = mutated(rng.choice(ROWS[dataset]), rng, ["gpt", "tool", "system"])
        file.write_bytes(b"\n" + text.replace(b"\n", b" ") + b"\n")
        return text

    def read():
        documents, refused = encode_rows(list(read_rows(file)), source.dataset, source.columns, tokenizer)
        assert all(f"{file}, line 2: " in problem for problem in refused), refused
        assert len(documents) + len(refused) <= 1
        return documents

    fuzz(count(30, 200), dataset, change, read)


def test_rows_in_other_files(tiny_folder, tmp_path, count):
    """A list in .json, and a mixture, through the whole of `prepare`."""
    tokenizer, file = load_tokenizer(tiny_folder), tmp_path / "rows.json"
    mixture = tmp_path / "mixture.json"
    mix = [{"dataset": "chat", "path": "rows.json", "weight": 1.5, "columns": {"system": "who"}}]
    rows = [row | {"who": "me"} for row in ROWS["chat"] * 2]

    def change(rng):
        file.write_text(json.dumps(rows))
        mixture.write_text(json.dumps(mix))
        chosen, content = rng.choice(((file, rows), (mixture, mix)))
        text = mutated(content, rng, ["rows.json", "chat", "samsum"])
        chosen.write_bytes(text)
        return chosen.name, text

    def read():
        config = DataConfig(mixture=mixture, bad_rows="skip", cache_dir=tmp_path / "cache", context_length=64)
        training_sources(config)
        prepare(config, tokenizer, 42, validation=False)

    fuzz(count(15, 150), "prepare", change, read)


def save_adapters(mesh, folder, out):
    """Checkpoints as lora_fsdp.py leaves them."""
    make_two(mesh, folder, out, norm=False)
    if mesh.get_rank() == 0:
        step = out / "sharded/checkpoints/step-00000002"
        content = json.loads((step / MANIFEST).read_text())
        del content["sha256"]
        content["flags"]["lora"] = asdict(LORA)
        content["fingerprints"]["model"] = weights_fingerprint(folder)
        (step / MANIFEST).write_text(json.dumps(content | {"sha256": hash_of(json.loads(json.dumps(content)))}))


def load_changed(mesh, folder, out, first, changes):
    """Each checkpoint.json, index.json and .metadata that is changed is refused, or the state is the one that was saved."""
    resume.WAITS = ()
    step = out / "sharded/checkpoints/step-00000002"
    run = training(folder, out / "new", norm=False)
    config = LoraRun(**{field.name: getattr(run.config, field.name) for field in fields(run.config)})
    with run.checkpoints(find_checkpoint(str(step), out)) as checkpoints:
        expected = {name: tensor.clone() for name, tensor in run.state(checkpoints).items()}
    original = {file.name: file.read_bytes() for file in step.iterdir()}

    def change(rng):
        restore()
        name = rng.choice((MANIFEST, MANIFEST, INDEX, ".metadata"))
        if name == ".metadata":
            text = bytearray(original[name])
            for _ in range(rng.randrange(1, 5)):
                text[rng.randrange(len(text))] = rng.randrange(256)
            forge(step, name, bytes(text))
        elif name == INDEX:
            text = mutated(
                json.loads(original[name]), rng, ["__0_0.distcp", "__1_0.distcp", "../step-00000001/__0_0.distcp"]
            )
            forge(step, name, text)
        else:
            content = json.loads(original[name])
            del content["sha256"]
            text = mutated(content, rng, ["full", "sharded", "cuda"])
            if rng.randrange(5):  # the hash can be adapted to the changes
                try:
                    content = json.loads(text)
                    text = json.dumps(content | {"sha256": hash_of(content)}).encode()
                except (ValueError, TypeError, RecursionError):
                    pass
            (step / name).write_bytes(text)
        return name, bytes(text)

    def restore():
        for name, content in original.items():
            (step / name).write_bytes(content)

    def read():
        checkpoint = find_checkpoint(str(step), out)
        compare_flags(config, checkpoint, checkpoint.content["fingerprints"])
        with run.checkpoints(checkpoint) as checkpoints:
            state = run.state(checkpoints)
        read_index(step)
        export_checkpoint(step, out / "exported", folder)
        return state

    def compare(state):
        shutil.rmtree(out / "exported", ignore_errors=True)
        same = state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
        return None if same else "another state"

    try:
        return fuzz(changes, "checkpoint", change, read, compare, first)
    finally:
        restore()


def test_checkpoint(tiny_folder, tmp_path, count):
    run_ranks(save_adapters, 2, tiny_folder, tmp_path)
    for first in range(0, count(25, 900), 25):  # each in a process of its own, that ends in time
        run_ranks(load_changed, 1, tiny_folder, tmp_path, first, 25)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
