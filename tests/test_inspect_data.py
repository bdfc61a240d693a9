"""tools/inspect_data.py: what it says of a set, against numbers counted by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import run_script

TOOL = Path(__file__).parents[1] / "tools" / "inspect_data.py"


def test_it_shows_samples_lengths_packing_and_refused_rows(tiny_folder, tmp_path):
    rows = [{"input": "x" * k, "target": "good", "id": k} for k in range(1, 11)]
    lines = [*map(json.dumps, rows), '{"input": "a"}', "["]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    flags = ["--model", tiny_folder, "--data.dataset", "grammar", "--data.path", tmp_path / "rows.jsonl"]
    flags += ["--data.context-length", 62, "--data.val-fraction", 0.2, "--samples", 20]
    codes, text = run_script(TOOL, *flags, log=tmp_path / "log")
    assert codes == [0], text
    assert "rows.jsonl: grammar; fields not used: id" in text
    # a row has BOS, 50 bytes of prompt around the input, 4 of target, EOS: from 57 to 66 tokens
    assert "longer than 62, dropped" in text and text.count("rows refused: 2") == 1
    assert "line 11: field 'target' is missing" in text and "line 12: not JSON" in text
    sample = "<|begin_of_text|>Correct this to standard English: x\n---\nCorrected: ⟦good<|end_of_text|>⟧"
    shown = [k for k in range(1, 11) if f": {'x' * k}\n---" in text]
    assert shown == [1, 3, 5, 6] and sample in text
    assert f"{len(shown)} documents, {sum(56 + k for k in shown)} tokens" in text
    assert f"{len(shown)} packs of 62, {sum(56 + k for k in shown) / 62 / len(shown):.2%} full" in text
    assert sum(int(line.split()[-1]) for line in text.split("validation")[0].splitlines() if "█" in line) == len(shown)


def test_a_terminal_that_lacks_characters(tiny_folder, tmp_path):
    rows = [{"input": "é🦙", "target": "日\u2028"}, {"input": "a", "target": "b<|end_of_text|>"}, {"\ud83d": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, TOOL, "--model", tiny_folder, "--data.dataset", "grammar"]
    command += ["--data.path", tmp_path / "rows.jsonl", "--data.cache-dir", tmp_path / "cache"]
    command += ["--data.val-path", tmp_path / "rows.jsonl"]
    run = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0, run.stderr
    text = run.stdout.decode("ascii")
    assert "\\xe9\\U0001f999" in text and "\\u27e6\\u65e5\\u2028<|end_of_text|>\\u27e7" in text
    assert "1 had BOS or EOS in their text" in text and "line 3: field 'input' is missing" in text


def test_what_is_wrong_is_said_once(tiny_folder, tmp_path):
    codes, text = run_script(TOOL, "--model", tiny_folder, "--data.path", tmp_path / "none.json", log=tmp_path / "log")
    assert codes == [1] and text.startswith("error: data file") and text.count("\n") == 1
