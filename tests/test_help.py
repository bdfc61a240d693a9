"""--help of every recipe and tool: sentences go on to the end of the line, whatever the terminal's width."""

import io
import runpy
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [file for folder in ("recipes", "tools", "tools/measure") for file in sorted((ROOT / folder).glob("*.py"))]
SCRIPTS = [file for file in SCRIPTS if "tyro.cli" in file.read_text()]


def broken(text):
    """Lines that end although the next word, of the same text, would have fitted."""
    boxes = [line[2:-2] for line in text.splitlines() if line.startswith("│")]
    for line, following in pairwise(boxes):
        column = len(following) - len(following.lstrip())
        same_text = column >= 6 and len(line) > column and line[column] != " " and line[:column].endswith("  ")
        room = len(line) - len(line.rstrip())
        if same_text and len(following.split()[0]) < room:
            yield line.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_is_filled(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    for width in ("80", "120"):
        monkeypatch.setenv("COLUMNS", width)
        stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # for which tyro draws its boxes
        with redirect_stdout(stream), pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        stream.flush()
        text = stream.buffer.getvalue().decode()
        assert end.value.code == 0 and "--help" in text
        assert max(len(line) for line in text.splitlines() if line.startswith("│")) <= int(width)
        assert not [*broken(text)]
        about = text.split("\n\n")[1]
        assert "\n" not in about, "the description is broken"


def test_what_is_broken_is_found():
    box = ["│ --resume STR             │", "│       or DIR, of           │", "│       a run (default: none) │"]
    assert [*broken("\n".join(box))] == ["or DIR, of"]
    assert len(SCRIPTS) == 22
