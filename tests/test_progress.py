"""Progress in a log: plain lines, few of them."""

import re
import sys

import pytest
from tqdm import tqdm

from minillama import progress as module
from minillama.progress import Lines, bar_class, progress


@pytest.mark.parametrize("seconds, lines", [(0.0, [1, 3, 4, 4]), (3600.0, [4])])
def test_lines_of_a_log(monkeypatch, capsys, seconds, lines):
    monkeypatch.setattr(module, "SECONDS", seconds)
    bar = progress(total=4, initial=0, desc="step", leave=True)
    bar.set_postfix_str("loss 2.5")
    for count in (1, 2, 1):
        bar.update(count)
        bar.refresh()
        tqdm.write("said above it", sys.stderr)
    bar.close()
    bar.close()
    said = capsys.readouterr().err.replace("said above it\n", "")
    shown = re.findall(r"^step (\d)/4, loss 2.5, after 00:00, .* to go$", said, re.M)
    assert [int(number) for number in shown] == lines and said.count("\n") == len(lines) and "\r" not in said


def test_a_log_of_what_is_iterated(monkeypatch, capsys):
    monkeypatch.setattr(module, "SECONDS", 0.0)
    assert list(progress(range(300), desc="rows", mininterval=0, miniters=1)) == list(range(300))
    numbers = [int(number) for number in re.findall(r"rows (\d+)/300", capsys.readouterr().err)]
    assert numbers == list(range(1, 301))
    with progress(desc="rows", unit="B", unit_scale=True) as bar:  # it is not known how many
        bar.update(2_500_000)
    assert capsys.readouterr().err.startswith("rows 2.50M/?B, after")


def test_who_says_it(monkeypatch, capsys):
    assert bar_class() is Lines
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert bar_class() is tqdm
    monkeypatch.setenv("RANK", "1")
    with progress(total=2, leave=True) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
