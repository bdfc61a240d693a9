"""The flags all recipes share, and those of an earlier run."""

import dataclasses
import datetime
import json
import shlex
import shutil
from pathlib import Path

import pytest
import tyro
from conftest import run_ranks, run_script

import minillama
from minillama.adapters.lora import LoraConfig
from minillama.data.cache import open_packed, prepare, prepare_evaluation
from minillama.data.datasets import AnyDataConfig, DataConfig, PreferenceConfig, _module
from minillama.errors import UserError
from minillama.tokenizer.tokenizer import load_tokenizer
from minillama.training.config import saved_flags
from minillama.training.optim import OptimConfig
from minillama.training.resume import Checkpoint
from minillama.training.run import flags_of_rows, with_date


@dataclasses.dataclass(frozen=True)
class Flags:
    model: str
    config: str | None = None
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()


def test_flags_of_an_earlier_run(tmp_path, monkeypatch):
    flags = Flags("m", optim=OptimConfig(lr=0.5), lora=LoraConfig(targets=("o_proj",)))
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"flags": dataclasses.asdict(flags)}))
    monkeypatch.setattr("sys.argv", ["x", "--optim.lr", "1", "--config", str(file)])
    assert saved_flags(Flags) == flags
    file.write_text(json.dumps({"flags": {"model": "m", "lora": {}, "optim": {"speed": 1}}}))
    with pytest.raises(UserError, match=r"no flag --optim.speed"):
        saved_flags(Flags)
    file.write_text("[]")
    with pytest.raises(UserError, match=r"is not the run\.json of a run"):
        saved_flags(Flags)
    monkeypatch.setattr("sys.argv", ["x", "--optim.lr", "1"])
    assert saved_flags(Flags) is None


DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}"
    "<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>' if add_generation_prompt }}"
)


@pytest.fixture
def dated_folder(tiny_folder, tmp_path):
    """A model whose chat template, like Llama 3.2's, asks for the day."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


def test_the_day_decides_ids_and_fingerprint_where_it_is_shown(tiny_folder, dated_folder):
    days = datetime.date(2024, 2, 29), datetime.date(2025, 1, 1)
    dated, plain = ([load_tokenizer(folder, day=day) for day in days] for folder in (dated_folder, tiny_folder))
    chat = [{"role": "user", "content": "a"}]
    texts = ["29 Feb 2024<|start_header_id|>", "01 Jan 2025<|start_header_id|>"]
    assert [t.decode(t.encode_chat(chat)[0])[: len(text)] for t, text in zip(dated, texts, strict=True)] == texts
    assert len({t.fingerprint for t in dated}) == 2 and len({t.fingerprint for t in plain}) == 1
    today = load_tokenizer(dated_folder)
    assert today.chat_text(chat).startswith(datetime.date.today().strftime("%d %b %Y"))
    with pytest.raises(UserError, match=r"--data\.date 2025-13-01: give a day as year-month-day"):
        DataConfig(date="2025-13-01")


def dates(mesh):
    dated, undated = (Checkpoint(Path(), {"flags": {"data": data}}) for data in ({"date": "2024-01-02"}, {}))
    given = DataConfig(date="2001-01-01")
    return [
        with_date(*case).date
        for case in ((DataConfig(), None), (DataConfig(), dated), (given, dated), (DataConfig(), undated))
    ]


def test_which_day_a_run_is_of():
    today = datetime.date.today().isoformat()
    assert run_ranks(dates, 2) == [[today, "2024-01-02", "2001-01-01", today]] * 2


def test_a_run_that_resumes_keeps_its_day(dated_folder, tmp_path):
    rows = [{"messages": [{"role": r, "content": f"{n}"} for r in ("user", "assistant")]} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Path(__file__).parents[1] / "recipes" / "lora_fsdp.py"

    def run(*flags):
        common = [
            "--model",
            dated_folder,
            "--output-dir",
            tmp_path / "out",
            "--device",
            "cpu",
            "--data.dataset",
            "chat",
        ]
        common += ["--data.path", tmp_path / "rows.jsonl", "--eval.no-enabled", "--data.context-length", 60]
        common += ["--data.cache-dir", tmp_path / "cache", "--train.batch-size", 1]
        codes, text = run_script(recipe, *common, *flags, log=tmp_path / "log")
        return codes[0], text, json.loads((tmp_path / "out/run.json").read_text())["flags"]["data"]["date"]

    code, text, day = run("--data.date", "2024-02-29", "--train.max-steps", 1, "--checkpoint.every", 1)
    assert (code, day) == (0, "2024-02-29"), text
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "out/adapter")
    code, text, day = run("--resume", "auto", "--train.max-steps", 2)
    assert (code, day) == (0, "2024-02-29") and "resumed     " in text, text
    code, text, _ = run("--resume", "auto", "--train.max-steps", 3, "--data.date", "2025-01-01")
    assert code == 1 and "cannot be resumed with --data.date 2025-01-01 (was 2024-02-29)" in text


OWN = """
import json
def pairs(config, tokenizer, split):
    return [{"prompt": f"{split} {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(9)]
def from_file(config, tokenizer, split):
    return map(json.loads, (config.path if split == "train" else config.val_path).read_text().splitlines())
"""
BUNDLED = Path(minillama.__file__).parent / "bundled"


@dataclasses.dataclass(frozen=True)
class Evaluated:
    data: AnyDataConfig = AnyDataConfig()
    seed: int = 42


@pytest.mark.parametrize(
    ("seed", "said", "flags"),
    [
        (42, f"--data.path {BUNDLED}/grammar_validation.csv", {}),
        (42, f"--data.path {BUNDLED}/grammar_train.csv --data.val-fraction 0.2", {"val_fraction": 0.2}),
        (7, "--data.path a.jsonl --data.val-fraction 0.2 --seed 7", {"path": "a.jsonl", "val_fraction": 0.2}),
        (7, "--data.path b.jsonl", {"path": "a.jsonl", "val_path": "b.jsonl"}),
        (7, "--data.val-fraction 0.3 --data.mixture m.json --seed 7", {"mixture": "m.json", "val_fraction": 0.3}),
        (42, "", {"dataset": "own.py:pairs"}),
        (7, "--data.val-fraction 0.3 --seed 7", {"dataset": "own.py:pairs", "val_fraction": 0.3}),
        (
            42,
            "--data.path a.jsonl --data.val-path b.jsonl",
            {"dataset": "own.py:from_file", "path": "a.jsonl", "val_path": "b.jsonl"},
        ),
    ],
)
def test_the_next_command_measures_the_rows_that_the_run_held_out(
    tiny_folder, tmp_path, monkeypatch, seed, said, flags
):
    monkeypatch.chdir(tmp_path)
    _module.cache_clear()
    Path("own.py").write_text(OWN)
    for name, count in (("a", 20), ("b", 5)):
        rows = [{"wrong": f"{name}{n}", "target": "x" * n, "text": "y" * n} for n in range(1, count)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"input": "wrong"}
    sources = [{"dataset": "grammar", "path": f"{name}.jsonl", "columns": columns, "weight": 2} for name in "ab"]
    Path("m.json").write_text(json.dumps(sources))
    flags = {
        name: Path(value) if name.endswith("path") or name == "mixture" else value for name, value in flags.items()
    }
    kind = PreferenceConfig if flags.get("dataset") == "own.py:pairs" else DataConfig
    given = {
        "dataset": "grammar",
        "context_length": 150,
        "too_long": "truncate",
        "cache_dir": tmp_path / "cache",
    } | flags
    if {"path", "mixture"} & flags.keys() and given["dataset"] == "grammar":
        given["columns"] = ("input=wrong",)
    data, tokenizer = kind(**given), load_tokenizer(tiny_folder)
    words = shlex.split(flags_of_rows(data, seed, evaluated=True))
    changed = (
        "--data.columns input=wrong " * ("columns" in given) + "--data.context-length 150 --data.too-long truncate"
    )
    assert sorted(words) == sorted(f"--data.dataset {data.dataset} {said} {changed}".split())
    parsed = tyro.cli(Evaluated, args=words)
    seen = dataclasses.replace(parsed.data, cache_dir=data.cache_dir).seen(
        tokenizer, "train" if data.val_fraction else "validation"
    )
    assert seen.pairs == data.pairs
    found, expected = (
        prepare_evaluation(seen, tokenizer, parsed.seed),
        prepare(data, tokenizer, seed, validation=True)[1],
    )
    found, expected = open_packed(found), open_packed(expected)
    texts = [
        sorted(tokenizer.decode(packed.documents.tokens[s : s + n].tolist()) for s, n in zip(*spans, strict=True))
        for packed in (found, expected)
        for spans in [(packed.starts.tolist(), packed.sizes.tolist())]
    ]
    assert texts[0] == texts[1] and texts[0]


def test_without_rows_held_out_the_next_command_has_a_place_for_them():
    for data, evaluated in (
        (DataConfig(), False),
        (DataConfig(path=Path("a.jsonl"), val_fraction=0.1), False),
        (
            DataConfig(dataset="alpaca", path=Path("a.jsonl")),
            True,
        ),  # its first twentieth, which evaluate.py does not know
    ):
        assert flags_of_rows(data, 7, evaluated=evaluated) == f"--data.dataset {data.dataset} --data.path FILE"


def test_labels_that_leave_nothing_to_train_are_refused(tiny_folder, tmp_path):
    (tmp_path / "own.py").write_text(
        "def rows(config, tokenizer, split):\n"
        "    return [{'input_ids': [1, 2, 3], 'labels': LABELS}] * 4\n"
        "def get_data_collator(tokenizer):\n"
        "    import torch\n"
        "    ones = torch.ones(4, 3).long()\n"
        "    return lambda rows: {'input_ids': ones, 'labels': -100 * ones}\n"
    )
    recipe = Path(__file__).parents[1] / "recipes" / "lora_fsdp.py"
    for labels, message in (
        ("[-100, -100, -100]", "own.py:rows, row 1: all labels but the first are -100, so nothing to train on"),
        ("[-100, 2, 3]", "step 1: none of its 12 tokens is trained: correct your collator's labels"),
    ):
        (tmp_path / "own.py").write_text((tmp_path / "own.py").read_text().replace("LABELS", labels))
        flags = ["--model", tiny_folder, "--output-dir", tmp_path / "out", "--device", "cpu", "--eval.no-enabled"]
        flags += ["--data.dataset", f"{tmp_path / 'own.py'}:rows", "--data.batching", "padding"]
        codes, text = run_script(recipe, *flags, log=tmp_path / "log")
        assert codes == [1] and message in text and "Traceback" not in text, text
        assert not (tmp_path / "out/adapter").exists()
        (tmp_path / "own.py").write_text((tmp_path / "own.py").read_text().replace(labels, "LABELS"))
