"""Mistakes of users, in every recipe and tool: one message that names the thing and what to do, and nothing left behind.

Each is made in this process, by running the script as Python does; those for two ranks in two processes that make them all.
"""

import ctypes
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import socket
import sys
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import TINY, _processes, random_model, save_folder
from safetensors.torch import load_file, save_file

from minillama.adapters.llama_adapter import LlamaAdapterConfig
from minillama.adapters.lora import LoraConfig
from minillama.adapters.peft import adapt, save_adapter
from minillama.data import datasets
from minillama.files import lock
from minillama.formats.hf import check_weights, read_config
from minillama.formats.hf_export import write_model
from minillama.model.llama import Llama
from minillama.training import output_folder
from minillama.training.resume import hash_of

ROOT = Path(__file__).parents[1]
ROWS = [{"dialogue": f"A: {'hi ' * (i % 5)}\nB: bye {i}", "summary": f"They part, {i}."} for i in range(12)]
DATA = "--data.path train.json --data.val-path val.jsonl --data.context-length 200"
EVAL = "--data.path train.json --data.context-length 200"
STEP = "run/checkpoints/step-00000001"
TRAIN = f"--model model --output-dir out --device cpu {DATA}"
STARTS = {
    "lora": f"recipes/lora_fsdp.py {TRAIN}",
    "full": f"recipes/full_fsdp.py {TRAIN}",
    "prompt": f"recipes/llama_adapter_fsdp.py {TRAIN}",
    "evaluate": "recipes/evaluate.py --model model --device cpu",
    "generate": "recipes/generate.py --model model --device cpu",
    **{file.stem: f"tools/{file.name}" for file in (ROOT / "tools").glob("*.py")},
    **{file.stem: f"tools/measure/{file.name}" for file in (ROOT / "tools/measure").glob("*.py")},
}

# what is given; the script with its flags; what the message names; what it says to do; the state of the disk meanwhile
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
a checkpoint as model | full --model STEP | is a checkpoint | tools/convert_checkpoint.py
a tokenizer as model | full --model model/tokenizer.model | model/tokenizer.model is a file | the folder that it is in
no JSON | lora --model not_json | not_json/config.json | cannot be read
JSON without end | full --model deep | deep/config.json | cannot be read
no architecture | prompt --model other | BertModel | LlamaForCausalLM
a billion layers | full --model layers | num_hidden_layers 1000000000 | of 3 layers
a vocabulary of 2^60 | lora --model vocabulary | vocab_size 1152921504606846976 | 16777216 is the most
a number of another kind | lora --model kind | hidden_size = '32' | int belongs
quantised in another way | lora --model quantised | quantization_config | give the plain one
quantised twice | generate --prompt a --model in_int8 --quantize nf4 | in_int8 is quantised already | leave that flag out
quantised, converted | convert_checkpoint in_int8 target --quantize int8 | in_int8 is quantised | give the plain model
quantised, all of it to be trained | full --model in_int8 | in_int8 is quantised | recipes/lora_fsdp.py
rows that NF4 cannot hold | lora --lora.quantize nf4 | rows of 32 weights | quantise as int8
rows that NF4 cannot hold, elsewhere | prompt --adapter.quantize nf4 | q_proj | quantise as int8
B that would not learn | lora --lora.plus-ratio 0 | --lora.plus-ratio 0 | above 0
a quantised run | convert_checkpoint STEP target --quantize nf4 | --quantize nf4 | convert to such a folder before
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
no time to be lost | lora --fsdp.lost-seconds 0 | --fsdp.lost-seconds 0 | at least 1
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
another recipe's run.json | full --config run/run.json | run.json is of another recipe | flags of lora
another run's folder | lora --output-dir busy | busy: wait for its end | another --output-dir
the same, to be resumed | full --output-dir busy --resume auto | busy: wait for its end | another --output-dir
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
a folder of no run | plot_metrics empty | empty/metrics.jsonl does not exist | output folder of a run
a folder as metrics | plot_metrics folded | folded/metrics.jsonl | Is a directory
metrics that are cut off | plot_metrics cutoff | metrics.jsonl, line 2 | drop the line
no name of a repository | download Llama-3.2-1B | Llama-3.2-1B is not ORG/NAME | huggingface.co
a bench of nothing | bench --steps 0 | --steps 0 | at least 1
rows of none to copy | data_speed --tokenizer model --rows none.json --folder target | none.json does not exist | .jsonl
a run to be measured in | checkpoint_cost --folder run --device cpu | run exists already | another target
a run to be killed in | kill_and_resume --folder run --model model | run exists already | another target
a step to be estimated | estimate_check --model nowhere | nowhere | does not exist
a fault in no file | mutants --output target --only nothing | nothing | model/llama
a run to be filled | data_speed --folder run --rows train.json --tokenizer model | run exists already | another target
a model to be measured in | conversion_cost --folder model | model exists already | another target
a model to be written over | loading_memory --folder model | model exists already | another target
advice with a strategy | estimate --model llama3-8b --advise --fsdp.strategy full-shard | --advise chooses | leave those
quantised twice, estimated | lora --model in_int8 --lora.quantize nf4 --estimate 2 | quantised already | leave that flag out
all of a quantised folder, estimated | estimate --model in_int8 --method full | in_int8 is quantised | --method lora
estimated on fewer than no GPU | estimate --model llama3-8b --gpus -1 | --gpus -1 | at least 0
all weights quantised, estimated | estimate --model llama3-8b --method full --quantize nf4 | --quantize nf4 | --method lora
a model of no name | estimate --model llama9 | llama9 is not here | llama3-8b
cards of no name | estimate --model llama3-8b --compare 24GB | --compare 24GB | as 8xh100-80
no whole machines | estimate --model llama3-8b --gpus 12 | --gpus 12 | give 8 or 16
a demo of no model | demo --model nowhere | nowhere: no such file or folder | a checkpoint's folder
hosts without a model | cluster_check --model nowhere --folder hosts | nowhere: no such folder | a small model
jobs without a model | slurm_check --model nowhere --folder hosts | nowhere: no such folder | a small model
ranks without a model | scale_counts --model nowhere | nowhere: no such folder | a small model
a check without a GPU | gpu_check --device cuda | no CUDA device | --device cpu
weights of integers | lora --model int8 | int8 holds weights of int8 | give the plain checkpoint
weights of fp8 | full --model fp8 | fp8 holds weights of float8_e4m3fn | give the plain checkpoint
weights of fp8, converted | convert_checkpoint fp8 target | fp8 holds weights of float8_e4m3fn | give the plain checkpoint
weights of fp8, merged | merge_lora fp8 adapter target --any-base | fp8 holds weights of float8_e4m3fn | plain checkpoint
weights of NaN, evaluated | evaluate --model nan EVAL | safetensors: model.layers.1.mlp.up_proj.weight holds NaN | damaged
weights of NaN, asked | generate --model nan --prompt a | model.layers.1.mlp.up_proj.weight holds NaN | damaged
weights of NaN, converted | convert_checkpoint nan target | model.layers.1.mlp.up_proj.weight holds NaN | damaged
weights of NaN, merged | merge_lora nan adapter target --any-base | model.layers.1.mlp.up_proj.weight holds NaN | damaged
an adapter of NaN, merged | merge_lora model spoilt target | spoilt/adapter_model.safetensors: base_model | damaged
architectures that are a number | lora --model arch5 | arch5: the architecture is not supported | found 5
a theta that is text | lora --model theta | rope_theta = 'x' | a float belongs
Meta's sizes as text | full --model params | params/params.json: dim must be a whole number | found "x"
added tokens that are a number | lora --model added | added/tokenizer_config.json: added_tokens_decoder must be an object | 5
a template that is a list | lora --model listed | listed/tokenizer_config.json: "chat_template" must be text | "name"
an adapter's rank as a fraction | lora --lora.from fraction | fraction/adapter_config.json: r must be a whole number | 8.0
an adapter's targets as a number | generate --adapter targets --prompt a | target_modules must be text or a list of text | 5
an adapter's base as a number | merge_lora model based target | base_model_name_or_path must be text | found 5
an adapter of rank 0 | merge_lora model rank0 target | rank0/adapter_config.json: rank 0 | at least 1
an adapter of a broken base | merge_lora model orphan target | orphan was trained on not_json | --any-base
a weight as text | lora --data.path None --data.mixture weighed.json | source 1: weight must be a number | "much"
messages that are numbers | lora --data.dataset chat --data.path five.jsonl | line 1: message 1 needs | 'content'
rows without end | lora --data.path deep.jsonl | deep.jsonl, line 1: not JSON | one object on each line
a binary file as flags | lora --config STEP/__0_0.distcp | is not the run.json of a run | UTF-8
a folder as flags | lora --config model | is not the run.json of a run | Is a directory
flags that are a number | full --config flags5.json | is not the run.json of a run | flags must be an object, found 5
a damaged GGUF | convert_checkpoint damaged.gguf target | damaged.gguf is a truncated or damaged GGUF file | version
a pipe as config | lora --model piped | piped/config.json is a pipe | give a file
a pipe as tokenizer | lora --model piped_tokenizer | piped_tokenizer/tokenizer.model is a pipe | give a file
a pipe as weights | full --model piped_weights | piped_weights/model.safetensors is a pipe | give a file
a pipe as rows | evaluate --data.path pipe.jsonl | pipe.jsonl is a pipe | .parquet
a pipe as prompts | generate --prompts pipe.jsonl | pipe.jsonl is a pipe | .parquet
a pipe as mixture | lora --data.path None --data.mixture pipe.jsonl | pipe.jsonl is a pipe | give a file
a pipe as flags | prompt --config pipe.jsonl | pipe.jsonl is a pipe | give a file
a pipe as adapter | merge_lora model piped_adapter target | piped_adapter/adapter_config.json is a pipe | give a file
a pipe as metrics | plot_metrics piped_metrics | metrics.jsonl is a pipe | give a file
a pipe in a checkpoint | convert_checkpoint piped_step target | index.json is missing | give another
fewer steps than were made | lora --resume later --train.max-steps 1 | is after step 3 | raise --train.max-steps
another seed than before | lora --resume run --seed 1 | resumed with --seed 1 (was 42): give | what it was made with
a run asked | generate --model run --prompt a | run is the output of a run | give the model/ in it
a run measured | evaluate --model run EVAL | run is the output of a run | give the model/ in it
an adapter asked | generate --model adapter --prompt a | adapter is an adapter | by its own flag
a checkpoint asked | generate --model STEP --prompt a | a checkpoint | tools/convert_checkpoint.py
a GGUF file measured | evaluate --model damaged.gguf EVAL | damaged.gguf is a GGUF file | tools/convert_checkpoint.py
weights asked | generate --model model/model.safetensors --prompt a | model.safetensors is a file | the folder that it is in
nothing held out | inspect_data --model model --data.path half.jsonl --data.val-fraction 0.4 | leaves none | line 2: field
nothing to measure on | evaluate --data.path train.json --data.val-fraction 0.01 | leaves none there | --data.val-fraction
no folder of tasks | evaluate --tasks x --include-path nowhere | --include-path nowhere | YAML files
a hub without a name | lora --data.path hub: | hub: names no data set | hub:ORG/NAME
an empty output | lora --output-dir '' | --output-dir is empty | give a value
an empty target | merge_lora model adapter '' | an argument is empty | give a value
an endless rate | lora --optim.lr 1e400 | --optim.lr inf | finite
no likely token | generate --prompt a --top-p 0 | --top-p 0.0 | above 0
no new tokens | generate --prompt a --max-new-tokens 0 | --max-new-tokens 0 | at least 1
batches of none | evaluate EVAL --batch-size 0 | --batch-size 0 | at least 1
a seed below 0 | evaluate EVAL --seed -1 | --seed -1 | at least 0
a device as output | evaluate EVAL --output device | --output device is a pipe or a device | name a file
a full disk, plotting | plot_metrics run | run/loss.png cannot be written | make room | full 100
a full disk, measuring | evaluate EVAL --output scores.json | scores.json cannot be written | make room | full 10
a full disk, merging | merge_lora model adapter target | target cannot be written | are needed): make room | full 3000
a full disk, converting | convert_checkpoint model target | target cannot be written | are needed): make room | full 3000
a full disk, writing the demo's data | make_demo_data | chat_train.jsonl cannot be written | make room | full 100
a full disk, starting | lora | --output-dir out cannot be written | make room | full 1000
unreadable: tokenizer | lora | model/tokenizer.model cannot be | permissions | locked model/tokenizer.model
unreadable: config | full | model/config.json cannot be read | permissions | locked model/config.json
unreadable: weights | generate --prompt a | model.safetensors cannot be read | permissions | locked model/model.safetensors
unreadable: model | lora | model/ | permissions | locked model
unreadable: adapter | lora --lora.from adapter | adapter/ | permissions | locked adapter
unreadable: a checkpoint | lora --resume run | checkpoint.json | permissions | locked STEP/checkpoint.json
unreadable: its parts | lora --resume run | __0_0.distcp cannot be read | see to the disk | locked STEP/__0_0.distcp
unreadable: checkpoints | lora --resume run | run/checkpoints | permissions | locked run/checkpoints
unreadable: a step | convert_checkpoint STEP target | step-00000001 | permissions | locked STEP
unreadable: GGUF | convert_checkpoint damaged.gguf target | damaged.gguf | permissions | locked damaged.gguf
unreadable: own rows | lora --data.dataset own.py --data.path None | own.py | permissions | locked own.py
unreadable: rows | evaluate EVAL | train.json cannot be read | permissions | locked train.json
unreadable: a folder of rows | lora --data.path mixed | mixed | permissions | locked mixed
unreadable: flags | lora --config run/run.json | run/run.json cannot be read | permissions | locked run/run.json
unreadable: metrics | plot_metrics run | metrics.jsonl cannot be read | permissions | locked run/metrics.jsonl
unwritable: output | evaluate EVAL --output empty/x.json | empty/x.json | may write to | kept empty
unwritable: a file of output | evaluate EVAL --output number.jsonl | number.jsonl | may write to | kept number.jsonl
unwritable: a run | lora --output-dir empty/out | --output-dir empty/out cannot be written | permissions | kept empty
unwritable: a target | merge_lora model adapter empty/target | empty/target cannot be written | permissions | kept empty
unwritable: cache | inspect_data --model model --data.path train.json | cannot be written | --data.cache-dir | home empty
no data, nor any to evaluate on | full --data.path none.json --data.val-path None | none.json does not exist | .parquet
an empty .json | lora --data.path empty.json | empty.json: empty | list of objects
a .json cut off | lora --data.path cut.json | cut.json: truncated, line 2 is not its last | list of objects
JSON lines as .json | lora --data.path lines.json | lines.json: not JSON (Extra data: line 2 | .jsonl
an empty config | lora --model blank | blank/config.json cannot be read | empty
own rows that fail | lora --data.dataset fails.py --data.path None | --data.dataset fails.py fails | No module
own rows that fail later | lora --data.dataset late.py:rows --data.path None | late.py fails | division by zero
cache below a file | lora --data.cache-dir train.json/x | a file is where a folder should be | --data.cache-dir
output below a file | lora --output-dir train.json/x | --output-dir train.json/x | a file is where a folder should be
fewer questions than none | evaluate EVAL --limit -1 | --limit -1 | at least 0
fewer tokens than none | generate --prompt a --max-new-tokens -1 | --max-new-tokens -1 | at least 1
a hub that may not be asked | download ORG/NAME | HF_HUB_OFFLINE is set | unset it
a package that is missing | lora --log.wandb | --log.wandb needs a package | pip install wandb
output of numbers below a file | evaluate EVAL --output train.json/x | --output train.json/x | a file is where a folder
another recipe's run | full --resume run | step-00000001 is of another recipe | the flags of lora
a damaged checkpoint by hand | lora --resume damaged/checkpoints/step-00000001 | __0_0.distcp was changed | remove
"""
TABLE = {}
for line in MISTAKES.replace("EVAL", EVAL).replace("STEP", STEP).strip().splitlines():
    name, given, thing, remedy, *state = (part.strip() for part in line.split("|"))
    TABLE[name] = shlex.split(given), [thing, remedy], *state
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
    (world / "busy").mkdir()
    assert lock(world / "busy") is not None  # until this process ends
    save_folder(random_model(), world / "model")
    save_folder(random_model(1), world / "stranger")
    variant(world, "not_json", "{")
    variant(world, "blank", "")
    variant(world, "deep", '{"a":' * 200_000)
    variant(world, "other", architectures=["BertModel"])
    variant(world, "layers", num_hidden_layers=10**9)
    variant(world, "vocabulary", vocab_size=2**60)
    variant(world, "kind", hidden_size="32")
    variant(world, "quantised", quantization_config={"bits": 4})
    with torch.device("meta"):
        weights = check_weights(Llama(read_config(world / "model")), world / "model")
    write_model(weights, read_config(world / "model"), world / "in_int8", world / "model", quantize="int8")
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
    spoilt = Path(shutil.copytree(world / "adapter", world / "spoilt")) / "adapter_model.safetensors"
    save_file({n: t.fill_(torch.inf) for n, t in load_file(spoilt).items()}, spoilt)
    settings = json.loads((world / "adapter/adapter_config.json").read_text())
    shutil.copytree(world / "adapter", world / "broken")
    (world / "broken/adapter_config.json").write_text(json.dumps(settings | {"r": "eight"}))
    config = variant(world, "params", files=["config.json"]) / "params.json"
    config.write_text('{"dim": "x", "n_layers": 3, "n_heads": 4, "norm_eps": 1e-5}')
    (world / "params/model.safetensors").rename(world / "params/consolidated.00.pth")
    save_file({n: (50 * t).to(torch.int8) for n, t in tensors.items()}, variant(world, "int8") / "model.safetensors")
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}, variant(world, "fp8") / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, variant(world, "nan") / "model.safetensors")
    variant(world, "arch5", architectures=5)
    variant(world, "theta", rope_theta="x")
    for name, names in {"added": {"added_tokens_decoder": 5}, "listed": {"chat_template": [5]}}.items():
        (variant(world, name) / "tokenizer_config.json").write_text(json.dumps(names))
    for name, changes in {
        "fraction": {"r": 8.0},
        "targets": {"target_modules": 5},
        "based": {"base_model_name_or_path": 5},
        "rank0": {"r": 0},
        "orphan": {"base_model_name_or_path": "not_json"},
    }.items():
        shutil.copytree(world / "adapter", world / name)
        (world / name / "adapter_config.json").write_text(json.dumps(settings | changes))
    files = {
        "train.json": json.dumps(ROWS),
        "val.jsonl": "\n".join(map(json.dumps, ROWS[:5])),
        "empty.jsonl": "",
        "cut.jsonl": f'{json.dumps(ROWS[0])}\n{{"dialogue": ',
        "listed.jsonl": json.dumps(ROWS),
        "number.jsonl": '{"dialogue": "a", "summary": 5}',
        "half.jsonl": json.dumps(ROWS[0]) + '\n{"dialogue": "a"}',
        "role.jsonl": '{"conversations": [{"from": ["human"], "value": "Hi"}]}',
        "mute.jsonl": '{"messages": [{"role": "user", "content": "Hi"}]}',
        "rows.csv": "dialogue,summary\na,b,c\n",
        "weighed.json": '[{"dataset": "samsum", "weight": "much"}]',
        "five.jsonl": '{"messages": [5]}',
        "deep.jsonl": '{"dialogue": ' + "[" * 100_000,
        "empty.json": "",
        "cut.json": '[{"dialogue": "a",\n "summary": "b',
        "lines.json": "\n".join(map(json.dumps, ROWS)),
        "fails.py": "import nowhere\n",
        "late.py": "def rows(*_):\n    yield 1 / 0\n",
        "flags5.json": '{"flags": 5}',
        "damaged.gguf": "GGUF and nothing that belongs there",
        "own.py": "",
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
    later = Path(shutil.copytree(world / "run", world / "later")) / "checkpoints/step-00000001/checkpoint.json"
    content = json.loads(later.read_text())
    del content["sha256"]
    content["progress"]["step"] = 3
    later.write_text(json.dumps(content | {"sha256": hash_of(content)}))
    shutil.copytree(world / STEP, world / "piped_step")
    for pipe in (
        variant(world, "piped", files=["config.json"]) / "config.json",
        variant(world, "piped_tokenizer", files=["tokenizer.model"]) / "tokenizer.model",
        variant(world, "piped_weights", files=["model.safetensors"]) / "model.safetensors",
        world / "pipe.jsonl",
        world / "piped_adapter/adapter_config.json",
        world / "piped_metrics/metrics.jsonl",
        world / "piped_step/index.json",
    ):
        pipe.parent.mkdir(exist_ok=True)
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
    (world / "device").symlink_to("/dev/null")
    return world


@contextmanager
def disk(world, state=""):
    """While a disk is full, a path may not be read ("locked") or written ("kept"), or the home not be written."""
    kind, _, what = state.partition(" ")
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), os.environ["XDG_CACHE_HOME"]
    try:
        if kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(what), limits[1]))
            yield
        elif kind:
            mode = (world / what).stat().st_mode
            (world / what).chmod({"locked": 0, "kept": 0o500, "home": 0o500}[kind])
            os.environ["XDG_CACHE_HOME"] = str(world / what / ".cache") if kind == "home" else before
            with without_privileges():
                yield
            (world / what).chmod(mode)
        else:
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        os.environ["XDG_CACHE_HOME"] = before


@contextmanager
def without_privileges():
    """For root too, permissions count: drops its capabilities to pass over them, CAP_DAC_OVERRIDE and the next two."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective, sets[0] = sets[0], sets[0] & ~0b1110
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


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
        for descriptor in output_folder._locks.values():  # those of a process, which ends with its run
            os.close(descriptor)
        output_folder._locks.clear()
        datasets._module.cache_clear()  # by its name in another folder
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
    if not boxes and sum(TABLE[name][1][0] in line for line in said.splitlines()) > 1:
        return f"said twice: {said[-600:]}"
    missing = [part for part in TABLE[name][1] if part not in text]
    return f"{missing} not in: {text}" if missing else None


@cache
def help_of(world, script):
    return attempt(world, [*STARTS[script].split()[:1], "--help"])[1]


def unknown_flags(world, name, said):
    """The flags that a message speaks of are the script's own, or were given to it."""
    named = re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", " ".join(re.findall(r"^error: .*", said, re.M)))
    known = " ".join([help_of(world, TABLE[name][0][0]), *command_of(name)]) if named else ""
    unknown = [flag for flag in named if not re.search(rf"{re.escape(flag)}(?![\w-])", known)]
    return f"it has no {unknown}" if unknown else None


def test_one_message_each(world):
    assert len(TABLE) >= 80 and {given[0] for given, *_ in TABLE.values()} == STARTS.keys()
    problems, before = {}, everything(world)
    for name in TABLE:
        with disk(world, *TABLE[name][2:]):
            code, said = attempt(world, command_of(name))
        problem = problem_of(name, [code], said) or unknown_flags(world, name, said)
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
