"""tools/inspect_data.py: what it says of a set, against numbers counted by hand."""

import json
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
    assert (1 not in shown or sample in text) and set(shown) <= {1, 2, 3, 4, 5, 6} and len(shown) >= 4
    assert f"{len(shown)} documents, {sum(56 + k for k in shown)} tokens" in text
    assert f"{len(shown)} packs of 62, {sum(56 + k for k in shown) / 62 / len(shown):.2%} full" in text
    assert sum(int(line.split()[-1]) for line in text.split("validation")[0].splitlines() if "█" in line) == len(shown)


def test_what_is_wrong_is_said_once(tiny_folder, tmp_path):
    codes, text = run_script(TOOL, "--model", tiny_folder, "--data.path", tmp_path / "none.json", log=tmp_path / "log")
    assert codes == [1] and text.startswith("error: data file") and text.count("\n") == 1
