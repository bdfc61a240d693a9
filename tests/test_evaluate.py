"""recipes/evaluate.py: the loss that training reports, and the scores that lm-evaluation-harness gives transformers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model, run_script, save_folder
from test_precision import FAST_BF16, SLOW_BF16, remember
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import minillama
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.adapters.peft import save_adapter
from minillama.data.cache import open_packed, prepare, prepare_evaluation
from minillama.data.datasets import DataConfig
from minillama.errors import UserError
from minillama.inference.load import find_stop_ids

RECIPES = Path(__file__).parents[1] / "recipes"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "ate",
    "two",
    "red",
    "apples",
    "while",
    "it",
    "rained",
    "in",
    "May",
]
TEMPLATE = (
    "{% for m in messages %}{{ bos_token if loop.first }}<|user|>{{ m.role }}: {{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 96 positions whose byte-level tokenizer, which adds a BOS, loads in transformers too."""
    path = tmp_path_factory.mktemp("evaluated")
    save_folder(random_model(max_position_embeddings=96), path, max_position_embeddings=96)
    (path / "tokenizer.model").unlink()
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: id_ for id_, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>", "<|user|>", *(f"<|{n}|>" for n in range(259, 512))])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|eos|>", "chat_template": TEMPLATE}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    config = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
    model = apply_lora(minillama.from_pretrained(folder), config)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    save_adapter(model, path, config, str(folder))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks on rows of its own, some of which are longer than the model's 96 positions."""
    path = tmp_path_factory.mktemp("tasks")
    random = np.random.default_rng(0)

    def some(count):
        return " ".join(random.choice(WORDS, count))

    rows = [{"q": some(2 + 3 * n), "choices": [some(1), some(2), some(4)], "answer": n % 3} for n in range(7)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path / "rows.jsonl")}}}
    common |= {"test_split": "test", "fewshot_split": "test", "num_fewshot": 0}
    choice = common | {"output_type": "multiple_choice", "doc_to_text": "{{q}} ?", "doc_to_target": "answer"}
    accuracy = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    match = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    perplexity = [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    stops = {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    for name, task in {
        "endings": choice | {"doc_to_choice": "choices", "metric_list": accuracy},
        "letters": choice | {"doc_to_choice": ["A", "B", "C"], "metric_list": accuracy, "num_fewshot": 1},
        "answers": common
        | {"output_type": "generate_until", "doc_to_text": "{{q}} ?", "doc_to_target": "{{q[:1]}}"}
        | {"generation_kwargs": stops, "metric_list": match},
        "texts": common
        | {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}, {{q}}."}
        | {"metric_list": perplexity},
    }.items():
        (path / f"{name}.yaml").write_text(json.dumps(task | {"task": name}))  # JSON is YAML
    return path


NAMES = ["endings", "letters", "answers", "texts"]


def harness(lm, tasks, names, chat=False):
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=tasks, include_defaults=False).load(names)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(1234)  # as simple_evaluate, which the recipe calls, and the harness' own command do
    return evaluate(lm, loaded, apply_chat_template=chat, fewshot_as_multiturn=chat, bootstrap_iters=0)


def ours(folder, batch_size, adapter=None):
    from minillama.inference.lm_eval import HarnessLM

    model, tokenizer = minillama.from_pretrained(folder), minillama.load_tokenizer(folder)
    model = minillama.load_adapter(model, adapter) if adapter else model
    return HarnessLM(model.eval(), tokenizer, find_stop_ids(tokenizer, folder), batch_size)


def theirs(folder, **kwargs):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2, **kwargs)


@pytest.fixture(scope="module")
def scores(folder, tasks):
    """Of the base, through transformers."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: extra eval")
    return harness(theirs(folder), tasks, NAMES)


def near(value, rel=1e-5):
    return pytest.approx(value, rel) if isinstance(value, float) else value


def same(mine, reference, names):
    assert mine["results"].keys() == reference["results"].keys() == set(names)
    for name in names:
        for metric, value in reference["results"][name].items():
            assert mine["results"][name][metric] == near(value), (name, metric)
        for a, b in zip(mine["samples"][name], reference["samples"][name], strict=True):
            assert a["arguments"] == b["arguments"]
            for [x], [y] in zip(a["resps"], b["resps"], strict=True):
                if isinstance(x, tuple):
                    assert x == (pytest.approx(y[0], abs=1e-4), y[1])
                else:
                    assert x == (y if isinstance(x, str) else pytest.approx(y, abs=1e-3))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_tasks_score_as_through_transformers(folder, tasks, scores, batch_size):
    same(harness(ours(folder, batch_size), tasks, NAMES), scores, NAMES)
    texts = [sample["resps"][0][0] for sample in scores["samples"]["answers"]]
    assert len(set(texts)) > 3 and not any("e" in text for text in texts)


def test_tasks_in_the_chat_format_and_with_an_adapter(folder, adapter, tasks, scores):
    names = NAMES[:3]
    mine = harness(ours(folder, 4, adapter), tasks, names, chat=True)
    same(mine, harness(theirs(folder, peft=str(adapter)), tasks, names, chat=True), names)


def evaluate(*flags, log, world_size=1):
    flags = ("--device", "cpu", *flags)
    return run_script(RECIPES / "evaluate.py", *flags, world_size=world_size, log=log)


def write_rows(file):
    rows = [{"dialogue": " ".join(WORDS[n:][:3]), "summary": WORDS[n]} for n in range(11)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_base_and_adapted_side_by_side_on_one_process_and_on_two(folder, adapter, tasks, scores, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    flags = ["--model", folder, "--adapter", adapter, "--compare", "--tasks", *NAMES, "--include-path", tasks]
    flags += [
        "--data.path",
        tmp_path / "rows.jsonl",
        "--data.context-length",
        200,
        "--batch-size",
        2,
        "--dtype",
        "fp32",
    ]
    found = []
    for world_size in (1, 2):
        output = tmp_path / f"{world_size}" / "scores.json"
        codes, text = evaluate(*flags, "--output", output, log=tmp_path / "log", world_size=world_size)
        assert codes == [0] * world_size, text
        found.append(json.loads(output.read_text())["results"])
        base, adapted = found[-1]["base"], found[-1]["adapted"]
        assert text.count("endings acc_norm") == 1
        assert re.search(f"eval_loss +{base['eval_loss']:.4f} +{adapted['eval_loss']:.4f}\n", text)
    one, two = found
    for column in ("base", "adapted"):
        assert one[column]["eval_loss"] == pytest.approx(two[column]["eval_loss"], rel=1e-6)
        assert one[column]["eval_tokens"] == two[column]["eval_tokens"] == sum(len(row["summary"]) + 1 for row in rows)
        for name in NAMES:
            first, second = one[column]["tasks"][name], two[column]["tasks"][name]
            assert first == {metric: near(value) for metric, value in second.items()}
    assert one["base"]["eval_loss"] != one["adapted"]["eval_loss"]
    for name in NAMES:
        for metric, value in scores["results"][name].items():
            if not metric.partition(",")[0].endswith("_stderr"):
                assert one["base"]["tasks"][name][metric] == near(value)


@pytest.mark.parametrize("precision", ["mixed", "fp32"])
def test_rows_as_training_evaluates_them(folder, tmp_path, precision):
    write_rows(tmp_path / "rows.jsonl")
    data = ["--data.path", tmp_path / "rows.jsonl", "--data.val-fraction", 0.3, "--data.context-length", 200]
    rates = {"mixed": FAST_BF16, "fp32": SLOW_BF16}[precision]  # which both find there
    data += ["--data.cache-dir", remember(tmp_path / "cache", rates, "math")]
    run = ["--model", folder, "--output-dir", tmp_path / "run", "--device", "cpu", "--seed", 7, "--train.max-steps", 1]
    run += ["--optim.lr", 0.1, "--checkpoint.every", -1]
    codes, text = run_script(RECIPES / "lora_fsdp.py", *run, *data, log=tmp_path / "log")
    assert codes == [0] and f"precision   {precision} (auto: " in text, text
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    before, after = [line for line in lines if "eval_loss" in line]
    assert before["eval_loss"] != after["eval_loss"]
    flags = ["--model", folder, "--adapter", tmp_path / "run" / "adapter", "--compare", "--seed", 7, *data]
    flags += ["--output", tmp_path / "scores.json"]
    codes, text = evaluate(*flags, log=tmp_path / "log")
    assert codes == [0], text
    found = json.loads((tmp_path / "scores.json").read_text())["results"]
    for line, column in ((before, "base"), (after, "adapted")):
        assert found[column]["eval_tokens"] == line["eval_tokens"]
        for name in ("eval_loss", "eval_perplexity"):
            assert found[column][name] == pytest.approx(line[name], rel=1e-6 if precision == "fp32" else 1e-3)


def test_which_rows_are_evaluated(folder, tmp_path):
    tokenizer = minillama.load_tokenizer(folder)
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file, count in zip(files, (30, 4), strict=True):
        text = "".join(json.dumps({"instruction": f"{file.stem}{n}", "output": "x"}) + "\n" for n in range(count))
        file.write_text(text)
    (tmp_path / "mixture.json").write_text(
        json.dumps([{"dataset": "alpaca", "path": file.name, "weight": 2} for file in files])
    )

    def evaluated(**flags):
        config = DataConfig(dataset="alpaca", context_length=2048, cache_dir=tmp_path / "cache", **flags)
        packed = open_packed(prepare_evaluation(config, tokenizer, 3))
        return config, packed, len(packed.sizes)

    assert evaluated(path=files[0])[2] == 30  # where training holds out a twentieth of alpaca
    assert evaluated(path=files[0], val_path=files[1])[2] == evaluated(val_path=files[1])[2] == 4
    assert evaluated(mixture=tmp_path / "mixture.json")[2] == 34
    assert evaluated(mixture=tmp_path / "mixture.json", val_path=files[1])[2] == 4
    config, packed, count = evaluated(path=files[0], val_fraction=0.2)
    held_out = prepare(config, tokenizer, 3, validation=True)[1]
    assert count == 6 and packed.fingerprint == open_packed(held_out).fingerprint
    assert packed.fingerprint != open_packed(prepare_evaluation(config, tokenizer, 4)).fingerprint
    assert evaluated(path=files[0])[1].fingerprint == evaluated(val_path=files[0])[1].fingerprint


def test_what_is_wrong_is_said_once(folder, adapter, tmp_path):
    other = save_folder(random_model(hidden_size=16), tmp_path / "other", hidden_size=16)
    rows = RECIPES.parent / "minillama" / "bundled" / "samsum_validation.jsonl"
    for flags, message in (
        ((), "give what to measure: rows with --data.path or --data.val-path, or --tasks"),
        (("--data.path", rows, "--compare"), "--compare needs the --adapter"),
        (("--data.path", tmp_path / "none.json"), "none.json does not exist"),
        (
            ("--data.path", rows, "--output", rows / "x.json"),
            "x.json cannot be written (a file is where a folder should be): name a file",
        ),
        (("--data.path", rows, "--output", tmp_path), f"--output {tmp_path} is a folder"),
        (("--model", other, "--adapter", adapter, "--compare", "--data.path", rows), "does not fit the model"),
    ):
        world_size = 2 if "--adapter" in flags else 1
        codes, text = evaluate("--model", folder, *flags, log=tmp_path / "log", world_size=world_size)
        assert codes == [1] * world_size and text.count("error: ") == 1 and message in text and "Traceback" not in text


def test_without_the_harness_the_message_says_what_to_install(folder, tmp_path):
    script = tmp_path / "without.py"
    script.write_text(
        "import runpy, sys\nsys.modules['lm_eval'] = None  # importing it fails\n"
        f"runpy.run_path({str(RECIPES / 'evaluate.py')!r}, run_name='__main__')\n"
    )
    codes, text = run_script(script, "--model", folder, "--tasks", "arc_easy", log=tmp_path / "log")
    assert codes == [1] and text.count("error: ") == 1 and 'pip install -e ".[eval]"' in text


def test_an_unknown_task_is_named_with_those_that_are_near(tasks):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: extra eval")
    from minillama.inference.lm_eval import load_tasks

    with pytest.raises(UserError, match=r"--tasks hellaswagg: no such task; did you mean .*hellaswag"):
        load_tasks(["endings", "hellaswagg"], tasks)
    (tasks / "broken.yaml").write_text(json.dumps({"task": "broken", "dataset_path": str(tasks / "none")}))
    with pytest.raises(UserError, match="--tasks broken cannot be loaded: "):
        load_tasks(["broken"], tasks)
