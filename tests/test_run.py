"""The flags all recipes share, and those of an earlier run."""

import dataclasses
import datetime
import json
import shutil
from pathlib import Path

import pytest
from conftest import run_ranks, run_script

from minillama.adapters.lora import LoraConfig
from minillama.data.datasets import DataConfig
from minillama.errors import UserError
from minillama.tokenizer.tokenizer import load_tokenizer
from minillama.training.config import saved_flags
from minillama.training.optim import OptimConfig
from minillama.training.resume import Checkpoint
from minillama.training.run import with_date


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
