"""Mistakes of users, in every recipe and tool: one message that names the thing and what to do, and nothing left behind.

Each is made in this process, by running the script as Python does; those for two ranks in two processes that make them all.
"""

import json
import os
import re
import runpy
import shutil
import socket
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import TINY, _processes, random_model, save_folder
from safetensors.torch import load_file, save_file

from minillama.adapters import adapt, save_adapter
from minillama.llama_adapter import LlamaAdapterConfig
from minillama.lora import LoraConfig

pytestmark = pytest.mark.xdist_group("mistakes")
ROOT = Path(__file__).parents[1]
ROWS = [{"dialogue": f"A: {'hi ' * (i % 5)}\nB: bye {i}", "summary": f"They part, {i}."} for i in range(12)]
DATA = "--data.path train.json --data.val-path val.jsonl --data.context-length 200"
TRAIN = f"--model model --output-dir out --device cpu {DATA}"
STARTS = {
    "lora": f"recipes/lora_fsdp.py {TRAIN}",
    "full": f"recipes/full_fsdp.py {TRAIN}",
    "prompt": f"recipes/llama_adapter_fsdp.py {TRAIN}",
    "evaluate": "recipes/evaluate.py --model model --device cpu",
    "generate": "recipes/generate.py --model model --device cpu",
    **{file.stem: f"tools/{file.name}" for file in (ROOT / "tools").glob("*.py")},
}

# what is given; the script with its flags; what the message names; what it says to do
MISTAKES = """
an unknown flag | lora --lora.rnak 8 | --lora.rnak | --lora.rank
no number | full --optim.lr fast | --optim.lr | float
no choice | lora --fsdp.precision fp12 | --fsdp.precision | mixed
a flag of another recipe | prompt --lora.rank 8 | --lora.rank | --help
a positional too few | merge_lora model | ADAPTER | the adapter's folder, in PEFT's format
no value | evaluate --data.path train.json --model | --model | --help
no model | lora --model nowhere | nowhere does not exist | ORG/NAME of the Hugging Face hub
an empty folder as model | full --model empty | empty is no model folder | config.json
an adapter as model | lora --model adapter | adapter is an adapter | by its own flag
a run as model | prompt --model run | run is the output of a run | give the model/ in it
a checkpoint as model | full --model run/checkpoints/step-00000001 | is a checkpoint | tools/convert_checkpoint.py
a tokenizer as model | full --model model/tokenizer.model | model/tokenizer.model | local folder
no JSON | lora --model not_json | not_json/config.json | cannot be read
JSON without end | full --model deep | deep/config.json | cannot be read
no architecture | prompt --model other | BertModel | LlamaForCausalLM
a billion layers | full --model layers | num_hidden_layers 1000000000 | of 3 layers
a vocabulary of 2^60 | lora --model vocabulary | vocab_size 1152921504606846976 | 16777216 is the most
a number of another kind | lora --model kind | hidden_size = '32' | int belongs
quantised | lora --model quantised | quantization_config | give the plain one
cut-off weights | lora --model cut | cut/model.safetensors | truncated
a tensor missing | full --model missing | model.norm.weight | is missing
shards out of the folder | lora --model outside | ../model/model.safetensors | move them there
shards that are not there | lora --model gone | model-00001-of-00002.safetensors | not there
pickles | full --model pickles | pytorch_model.bin | save_pretrained
a tied head that is not | full --model untied | tie_word_embeddings | set it to false
no tokenizer | lora --model untokenized | untokenized | tokenizer.model
another's tokenizer | lora --tokenizer larger | the tokenizer has 513 ids | --tokenizer
no tokenizer there | full --tokenizer nowhere | nowhere | give a checkpoint's folder
output on /proc | lora --output-dir /proc/out | --output-dir /proc/out | cannot be written
a file as output | full --output-dir train.json | --output-dir train.json | cannot be written
a run in the output | lora --output-dir run | run already holds a run | --resume auto
an unknown dataset | lora --data.dataset poems | poems is unknown | samsum
no data | full --data.path none.json | none.json does not exist | .parquet
data of no kind | lora --data.path model/tokenizer.model | unknown format '.model' | .jsonl
a folder of two kinds | lora --data.path mixed | .json, .jsonl | leave one kind in it
no rows | lora --data.path empty.jsonl | empty.jsonl has no rows | at least one
a line cut off | lora --data.path cut.jsonl | line 2: not JSON | one object on each line
a list as .jsonl | lora --data.path listed.jsonl | line 1: a row must be an object | found
fields of another format | lora --data.dataset alpaca | row 1: field 'instruction' | --data.columns
a number as text | full --data.path number.jsonl | line 1: field 'summary' must be text | drop the row
a list as role | lora --data.dataset chat --data.path role.jsonl | line 1: turn 1 needs 'from', one of human | found
no answer | lora --data.dataset chat --data.path mute.jsonl | line 1: no message has the role 'assistant' | drop
JSON as CSV | lora --data.path rows.csv | rows.csv, line 2: 3 fields, the header has 2 | quotes
not UTF-8 | lora --data.path latin.jsonl | line 1: not UTF-8 | save the file as UTF-8
bad rows alone | lora --data.path number.jsonl --data.bad-rows skip | no row can be used | must be text
columns of no field | lora --data.columns title=text | samsum has no field title | dialogue
columns half | lora --data.columns dialogue | --data.columns dialogue | FIELD=COLUMN
a mixture of none | lora --data.path None --data.mixture train.json | source 1 | 'dataset'
a mixture and a path | lora --data.mixture train.json | --data.mixture and --data.path | name the path
a long row | lora --data.context-length 20 | longer than --data.context-length 20 | raise it
a context of one | full --data.context-length 1 | --data.context-length 1 | at least 2
all rows held out | lora --data.val-path None --data.val-fraction 1.5 | --data.val-fraction 1.5 | below 1
nothing to evaluate on | full --data.val-path None | train.json | --eval.no-enabled
a learning rate of nan | lora --optim.lr nan | --optim.lr nan | above 0
a batch of none | full --train.batch-size 0 | --train.batch-size 0 | at least 1
a negative seed | lora --seed -1 | --seed -1 | at least 0
moments in fp16 | full --fsdp.precision fp16 --optim.kind anyprecision | --optim.kind anyprecision | adamw
a shard of three | full --fsdp.strategy hybrid-shard --fsdp.shard-size 3 | --fsdp.shard-size 3 | number that are to hold
a shard of full-shard | full --fsdp.shard-size 2 | --fsdp.shard-size 2 | hybrid-shard
no time | lora --fsdp.timeout-minutes 0 | --fsdp.timeout-minutes 0 | above 0
a GPU that is not there | lora --device cuda | --device cuda | --device cpu
a kernel of GPUs | full --kernels.attention varlen | --kernels.attention varlen | CPU
a target that is none | lora --lora.targets z_proj | "z_proj" matches no layer | q_proj
rank 0 | lora --lora.rank 0 | --lora.rank 0 | at least 1
always dropped | lora --lora.dropout 1 | --lora.dropout 1 | below 1
an adapter of none | lora --lora.from nowhere | nowhere does not exist | give the adapter/
a prompt as LoRA | lora --lora.from prompt | prompt holds another kind of adapter | LlamaAdapterConfig
another rank than it has | lora --lora.from adapter --lora.rank 5 | rank 5 was asked for | leave it out
a broken adapter | lora --lora.from broken | broken/adapter_config.json: r must be a whole number | found "eight"
frozen layers under LoRA | lora --train.freeze-layers 1 | --train.freeze-layers | full_fsdp.py
more frozen than there are | full --train.freeze-layers 4 | --train.freeze-layers 4 | has 3 layers
no prompt | prompt --adapter.prompt-len 0 | --adapter.prompt-len 0 | at least 1
no run.json | lora --config none.json | --config none.json | is not the run.json of a run
another recipe's run.json | full --config run/run.json | run.json is of another recipe | --lora
no checkpoint | lora --resume empty | --resume empty | the folder of one, or of a run, or auto
a damaged checkpoint | lora --resume damaged | __0_0.distcp was changed | remove them
another rank than before | lora --resume run --lora.rank 4 | --lora.rank 4 (was 8) | give what it was made with
other data than before | lora --resume run --data.path val.jsonl | --data.path | give what it was made with
a checkpoint every -2 | full --checkpoint.every -2 | --checkpoint.every -2 | at least 1
the best of no evaluation | lora --checkpoint.best --eval.no-enabled | --checkpoint.best | --eval.enabled
a log every 0 | full --log.every 0 | --log.every 0 | at least 1
memory of a CPU | lora --profile.memory-snapshot m.pickle | --profile.memory-snapshot | leave it out
nothing to measure | evaluate | rows with --data.path | --tasks
nothing to compare | evaluate --data.path train.json --compare | --compare | --adapter
output that is a folder | evaluate --data.path train.json --output run | --output run is a folder | name a file in it
another's adapter | evaluate --data.path train.json --adapter wide | wide/adapter_model.safetensors | does not fit the model
nothing to ask | generate | --prompt | give one of
two things to ask | generate --prompt a --chat | --prompt | give one of
a cold temperature | generate --prompt a --temperature -1 | temperature -1 | at least 0
no prompts | generate --prompts none.jsonl | none.jsonl does not exist | .jsonl
rows without a prompt | generate --prompts train.json | row 1 | 'prompt'
no source | convert_checkpoint nowhere target | nowhere: no such file or folder | GGUF file
a target with something | convert_checkpoint model run | run exists already | another target
a target in the source | convert_checkpoint model model/meta | model/meta is in model | elsewhere
three files of two heads | convert_checkpoint model target --files 3 | --files 3 | n_kv_heads
a base of a model | convert_checkpoint model target --base model | --base | run's checkpoint
a run's folder of steps | convert_checkpoint run/checkpoints target | give one of them | step-00000001
a damaged step | convert_checkpoint damaged/checkpoints/step-00000001 target | __0_0.distcp was changed | give another
no GGUF | convert_checkpoint train.json target | train.json is not a GGUF file | give a folder
a prompt to be merged | merge_lora model prompt target | prompt is a llama-adapter | only LoRA
another model's adapter | merge_lora stranger adapter target | stranger | --any-base
an adapter that is none | merge_lora model train.json target | train.json is no folder | give the adapter/
no data to look at | inspect_data --model model --data.path none.json | none.json does not exist | .jsonl
a folder of no run | plot_metrics empty | empty/metrics.jsonl does not exist | --output-dir of a run
a folder as metrics | plot_metrics folded | folded/metrics.jsonl | Is a directory
metrics that are cut off | plot_metrics cutoff | metrics.jsonl, line 2 | drop the line
no name of a repository | download Llama-3.2-1B | Llama-3.2-1B is not ORG/NAME | huggingface.co
a bench of nothing | bench --steps 0 | --steps 0 | at least 1
rows of none to copy | data_speed --tokenizer model --rows none.json --folder target | none.json does not exist | .jsonl
"""
TABLE = {}
for line in MISTAKES.strip().splitlines():
    name, given, *said = (part.strip() for part in line.split("|"))
    TABLE[name] = given.split(), said
ON_TWO_RANKS = """
an unknown flag, no model, a billion layers, a vocabulary of 2^60, cut-off weights, shards out of the folder, no data,
a tied head that is not, another's tokenizer, output on /proc, a run in the output, a line cut off, a list as role,
a long row, a mixture of none, a learning rate of nan, a shard of three, a target that is none, a prompt as LoRA,
a broken adapter, another recipe's run.json, no checkpoint, a damaged checkpoint, another rank than before,
output that is a folder, another's adapter, two things to ask, rows without a prompt"""
ON_TWO_RANKS = [name.strip() for name in ON_TWO_RANKS.replace("\n", " ").split(",")]


def variant(world, name, config=None, files=(), **changes):
    """A copy of the model with another config.json, and files removed."""
    folder = Path(shutil.copytree(world / "model", world / name))
    (folder / "config.json").write_text(json.dumps(TINY | changes) if config is None else config)
    for file in files:
        (folder / file).unlink()
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the mistakes are made with."""
    world = tmp_path_factory.mktemp("world")
    save_folder(random_model(), world / "model")
    save_folder(random_model(1), world / "stranger")
    variant(world, "not_json", "{")
    variant(world, "deep", '{"a":' * 200_000)
    variant(world, "other", architectures=["BertModel"])
    variant(world, "layers", num_hidden_layers=10**9)
    variant(world, "vocabulary", vocab_size=2**60)
    variant(world, "kind", hidden_size="32")
    variant(world, "quantised", quantization_config={"bits": 4})
    os.truncate(variant(world, "cut") / "model.safetensors", 9000)
    tensors = load_file(world / "model/model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if n != "model.norm.weight"}, variant(world, "missing") / "model.safetensors"
    )
    for name, file in (("outside", "../model/model.safetensors"), ("gone", "model-00001-of-00002.safetensors")):
        index = variant(world, name, files=["model.safetensors"]) / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
    (variant(world, "pickles", files=["model.safetensors"]) / "pytorch_model.bin").write_bytes(b"x")
    variant(world, "untied", tie_word_embeddings=True)
    variant(world, "untokenized", files=["tokenizer.model"])
    larger = variant(world, "larger") / "tokenizer.model"
    larger.write_text(larger.read_text() + "YWI= 256\n")
    for name, adapter in {
        "adapter": LoraConfig(),
        "prompt": LlamaAdapterConfig(prompt_len=2),
        "wide": LoraConfig(targets=("o_proj",)),
    }.items():
        save_adapter(adapt(random_model(), adapter), world / name, adapter, str(world / "model"))
    wide = load_file(world / "wide/adapter_model.safetensors")
    save_file({n: torch.cat((t, t)) for n, t in wide.items()}, world / "wide/adapter_model.safetensors")
    settings = json.loads((world / "adapter/adapter_config.json").read_text())
    shutil.copytree(world / "adapter", world / "broken")
    (world / "broken/adapter_config.json").write_text(json.dumps(settings | {"r": "eight"}))
    files = {
        "train.json": json.dumps(ROWS),
        "val.jsonl": "\n".join(map(json.dumps, ROWS[:5])),
        "empty.jsonl": "",
        "cut.jsonl": f'{json.dumps(ROWS[0])}\n{{"dialogue": ',
        "listed.jsonl": json.dumps(ROWS),
        "number.jsonl": '{"dialogue": "a", "summary": 5}',
        "role.jsonl": '{"conversations": [{"from": ["human"], "value": "Hi"}]}',
        "mute.jsonl": '{"messages": [{"role": "user", "content": "Hi"}]}',
        "rows.csv": "dialogue,summary\na,b,c\n",
        "mixed/a.json": "[]",
        "mixed/b.jsonl": "",
        "empty/.nothing": "",
        "folded/metrics.jsonl/.nothing": "",
        "cutoff/metrics.jsonl": '{"step": 1, "loss": 2}\n{"step"',
    }
    for name, text in files.items():
        (world / name).parent.mkdir(parents=True, exist_ok=True)
        (world / name).write_text(text)
    (world / "latin.jsonl").write_bytes('{"dialogue": "é", "summary": "b"}'.encode("latin-1"))
    code, said = attempt(
        world, [*STARTS["lora"].split(), "--output-dir", "run", "--train.max-steps", "1", "--eval.no-enabled"]
    )
    assert code == 0, said
    damaged = Path(shutil.copytree(world / "run", world / "damaged")) / "checkpoints/step-00000001/__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    return world


def attempt(world, command):
    """Runs a script in this process and in the world's folder: its exit code, and what it printed."""
    before, here, said = sys.argv, Path.cwd(), StringIO()
    sys.argv = [str(ROOT / command[0]), *command[1:]]
    os.chdir(world)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = traceback.format_exc()
    finally:
        sys.argv = before
        os.chdir(here)
    return code, said.getvalue()


def command_of(name):
    script, *flags = TABLE[name][0]
    return [*STARTS[script].split(), *flags]


def everything(world):
    return sorted((str(file.relative_to(world)), file.stat().st_size) for file in world.rglob("*") if file.is_file())


def problem_of(name, codes, said):
    """What is not as it should be; None if all is."""
    errors = re.findall(r"^error: .*", said, re.M)
    boxes = [re.sub(r"[│╭╰─╮╯|]|\s+", " ", said)] if 2 in codes else []  # tyro's, of a flag that is none
    text = re.sub(r"\s+", " ", (boxes or errors or [""])[0])
    if not all(isinstance(code, int) and code in (1, 2) for code in codes):
        return f"exit codes {codes}: {said[-300:]}"
    if len(boxes or errors) != 1 or "Traceback" in said:
        return f"{len(errors)} messages: {said[-600:]}"
    missing = [part for part in TABLE[name][1] if part not in text]
    return f"{missing} not in: {text}" if missing else None


def test_one_message_each(world):
    assert len(TABLE) >= 80 and {given[0] for given, _ in TABLE.values()} >= {
        "lora",
        "full",
        "prompt",
        "evaluate",
        "generate",
    }
    problems, before = {}, everything(world)
    for name in TABLE:
        code, said = attempt(world, command_of(name))
        problem = problem_of(name, [code], said)
        left = set(everything(world)) ^ set(before)
        if problem or left:
            problems[name] = f"{problem or ''} left: {sorted(left)[:3]}" if left else problem
            before = everything(world)
    assert not problems, "\n".join(f"{name}: {problem}" for name, problem in problems.items())


def attempt_all(world, ports, names):
    """In each of two processes: the mistakes one after the other, each in a group of its own."""
    found = []
    for port, name in zip(ports, names, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        found.append(attempt(world, command_of(name)))
    return found


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_one_message_of_two_ranks(world):
    before = everything(world)
    results = _processes(attempt_all, 2, world, free_ports(len(ON_TWO_RANKS)), ON_TWO_RANKS)
    assert all(kind == "ok" for kind, _ in results), results
    problems = {}
    for number, name in enumerate(ON_TWO_RANKS):
        codes, said = zip(*(found[number] for _, found in results), strict=True)
        problems[name] = problem_of(name, codes, "\n".join(said))
    problems = {name: problem for name, problem in problems.items() if problem}
    assert not problems, "\n".join(f"{name}: {problem}" for name, problem in problems.items())
    assert everything(world) == before
