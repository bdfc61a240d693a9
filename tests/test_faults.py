"""Faults that are no user's mistake: disks, signals and other processes. One message, and nothing lost."""

import ast
import os
import platform
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from conftest import _processes, random_model, run_script, save_folder, start_script
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.adapters.peft import save_adapter
from minillama.data.cache import open_packed, prepare
from minillama.data.datasets import DataConfig
from minillama.errors import UserError
from minillama.files import PARTIAL, lock, new_folder, write_json, write_whole
from minillama.parallel.heartbeat import LOOKS, Heartbeat
from minillama.tokenizer.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
ROUNDS = 5


def convert_at_once(source, targets):
    """In each of two processes: the same conversions, each begun when both are there."""
    import runpy
    import sys

    own, codes = os.environ.pop("RANK"), []
    for target in targets:
        target.with_name(f"{target.name}.{own}").touch()
        while not target.with_name(f"{target.name}.{1 - int(own)}").exists():
            time.sleep(0.0002)
        sys.argv = [str(ROOT / "tools/convert_checkpoint.py"), str(source), str(target)]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            codes.append(0)
        except SystemExit as end:
            codes.append(end.code)
    return codes


def test_two_writers_of_one_target(tiny_folder, tmp_path):
    targets = [tmp_path / f"meta{number}" for number in range(ROUNDS)]
    (_, first), (_, second) = _processes(convert_at_once, 2, tiny_folder, targets)
    # one is refused, or comes so late that it replaces what the other has finished
    assert all(sorted(codes) in ([0, 0], [0, 1]) for codes in zip(first, second, strict=True)), (first, second)
    whole = sorted(file.stat().st_size for file in targets[0].iterdir())
    assert len(whole) == 3
    assert all(sorted(file.stat().st_size for file in target.iterdir()) == whole for target in targets)
    assert not list(tmp_path.glob(f".*{PARTIAL}"))


@pytest.mark.parametrize("there", [False, True])
def test_a_writer_that_finishes_at_the_same_moment_stays(there, tmp_path, monkeypatch):
    target, rename = tmp_path / "target", Path.rename
    if there:
        target.mkdir()
        (target / "mark").touch()

    def as_another_finishes(path, to):
        if path.name.endswith(PARTIAL):
            target.mkdir()
            (target / "mark").write_text("another's")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", as_another_finishes)
    with pytest.raises(UserError, match=r"another process has written .*target meanwhile"), new_folder(target, "mark"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["target"] and (target / "mark").read_text() == "another's"


def test_what_is_written_follows_no_link_and_replaces_no_other_s(tmp_path):
    victim, target = tmp_path / "victim", tmp_path / "target"
    victim.mkdir()
    (victim / "keep").touch()
    for name in (f".target.12345678{PARTIAL}", ".target.minillama-partial"):
        (tmp_path / name).symlink_to(victim)
    (tmp_path / f".target.abandoned{PARTIAL}").mkdir()
    held = tmp_path / f".target.held{PARTIAL}"
    held.mkdir()
    descriptor = lock(held)
    with new_folder(target, "mark") as (path, on_disk):
        on_disk(write_json, path / "mark", {})
    assert [file.name for file in victim.iterdir()] == ["keep"] and (target / "mark").is_file()
    assert held.is_dir() and not (tmp_path / f".target.abandoned{PARTIAL}").exists()
    assert descriptor is not None
    os.close(descriptor)
    with pytest.raises(UserError, match=r"another process has written .*target meanwhile"), new_folder(target, "mark"):
        shutil.rmtree(target)
        target.mkdir()
    (tmp_path / "run.json").symlink_to(victim / "keep")
    write_whole(tmp_path / "run.json", "new")
    assert (tmp_path / "run.json").read_text() == "new" and (victim / "keep").read_text() == ""


def test_changed_data_is_made_again(tiny_folder, tmp_path, capsys):
    tokenizer, config = load_tokenizer(tiny_folder), DataConfig(cache_dir=tmp_path, context_length=512)
    folder, _ = prepare(config, tokenizer, 0, validation=False)
    expected = open_packed(folder).documents.tokens.copy()
    file = folder.parent / "tokens.bin"
    for damage in (lambda: np.zeros_like(expected).tofile(file), lambda: os.truncate(file, 100), file.unlink):
        damage()
        assert prepare(config, tokenizer, 0, validation=False)[0] == folder
        assert capsys.readouterr().err.count(f"the data in {folder.parent} was changed") == 1
        assert np.array_equal(open_packed(folder).documents.tokens, expected)
    prepare(config, tokenizer, 0, validation=False)
    assert capsys.readouterr().err == ""


CUT = """
import os, sys
from pathlib import Path
import numpy as np
from minillama.parallel.failures import user_errors
from minillama.parallel.processes import process_group
with user_errors(), process_group("cpu"):
    file = Path(sys.argv[1])
    file.write_bytes(bytes(1 << 20))
    mapped = np.memmap(file, np.uint8, "r")
    os.truncate(file, 5000)
    print(mapped.sum())
"""
LOST = """
import os, signal, sys, time
import torch.distributed as dist
from minillama.parallel.failures import user_errors
from minillama.parallel.heartbeat import stand
from minillama.parallel.processes import on_rank_zero, process_group
from minillama.errors import UserError
what, fails = sys.argv[1], int(sys.argv[2])
os.environ["TORCHELASTIC_ERROR_FILE"] = f"{sys.argv[0]}.{os.environ['RANK']}"
minutes = 0.05 if what == "late" else 30
with user_errors(), process_group("cpu", minutes, lost_seconds={"frozen": 2, "unnoticed": 2, "late": 12}.get(what, 60)):
    if dist.get_rank() == fails and what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == fails and what == "fault":
        raise ValueError("of our own")
    if dist.get_rank() == fails and what == "elsewhere":
        raise RuntimeError("Connection refused by a server that is none of ours")
    if dist.get_rank() == fails and what == "mistake":
        raise UserError("a mistake: make none")
    if what == "frozen" and dist.get_rank() == fails:
        stand("step 7")
        dist.barrier()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "frozen":
        stand("step 7")
        dist.barrier()
        stand("step 8")
    if what == "late" and dist.get_rank() == fails:
        stand("the evaluation after step 8")
        time.sleep(6)
    if what == "unnoticed":
        if dist.get_rank() == fails:
            raise ValueError("of our own")
        time.sleep(100)  # as a collective does that is not told of the error
    if what == "on zero":
        on_rank_zero(lambda: [][1])
    dist.barrier()
"""


START = """
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

"""
INTERRUPTED = """
import os, sys
from tqdm import tqdm
from minillama.parallel.failures import user_errors
if sys.argv[1] == "importing":
    os.kill(os.getpid(), signal.SIGINT)
with user_errors():
    tqdm(range(3)).update()
    os.kill(os.getpid(), signal.SIGINT)
"""


def torchrun_says(file, codes):
    """The end of torchrun's report, without its frame, on processes with these exit codes."""
    failures = {n: ProcessFailure(n, 0, -9 if code is None else code, f"{file}.{n}") for n, code in enumerate(codes)}
    return str(ChildFailedError("a recipe", failures)).rstrip("=\n").rpartition("traceback : ")[2]


def script(tmp_path, text):
    file = tmp_path / "script.py"
    file.write_text(text)
    return file


def test_a_mapped_file_that_is_cut_short(tmp_path):
    codes, text = run_script(script(tmp_path, CUT), tmp_path / "tokens.bin", log=tmp_path / "log")
    assert codes == [None]  # ended there and then
    assert f"error: {tmp_path}/tokens.bin was cut short while it was read" in text and "Traceback" not in text


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_killed_rank_is_named(tmp_path, rank):
    codes, text = run_script(script(tmp_path, LOST), "killed", rank, world_size=3, log=tmp_path / "log")
    assert codes == [None if number == rank else 1 for number in range(3)]
    said = (
        rf"error: rank {rank} \((killed by SIGKILL|its process has ended)\) is gone"  # the second once it is waited for
    )
    assert len(re.findall(said, text)) == text.count("error: ") == 1, text
    assert "Traceback" not in text
    assert re.match(said, torchrun_says(tmp_path / "script.py", codes))


@pytest.mark.parametrize(
    "what, rank, said",
    [
        ("fault", 0, "ValueError"),
        ("fault", 1, "ValueError"),
        ("on zero", 0, "IndexError"),
        ("elsewhere", 0, "Connection refused by a server"),
        ("elsewhere", 1, "Connection refused by a server"),
    ],
)
def test_a_fault_is_told_once_by_the_rank_that_had_it(tmp_path, what, rank, said):
    codes, text = run_script(script(tmp_path, LOST), what, rank, world_size=2, log=tmp_path / "log")
    assert codes == [1, 1] and text.count("Traceback") == 1 and f"rank {rank} has failed" in text and said in text, text
    assert "error: " not in text.replace("Error: ", "")
    assert re.match(
        rf"rank . has failed, see its traceback above: .*{said}", torchrun_says(tmp_path / "script.py", codes)
    )


def test_an_error_ends_ranks_that_do_not_notice_it(tmp_path):
    processes, wait = start_script(script(tmp_path, LOST), "unnoticed", 1, world_size=3, log=tmp_path / "log")
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [1, 0, 1]  # those that ended on their own return, and tell
    codes, text = wait()
    assert codes == [None, 1, None] and text.count("Traceback") == 1 and "rank 1 has failed" in text, text


def test_torchrun_s_report_ends_with_the_message(tmp_path):
    codes, text = run_script(script(tmp_path, LOST), "mistake", 1, world_size=2, log=tmp_path / "log")
    assert codes == [1, 1] and text == "\nerror: a mistake: make none\n"
    assert torchrun_says(tmp_path / "script.py", codes) == "error: a mistake: make none"


def test_a_frozen_rank_is_named_and_ends_when_it_wakes(tmp_path):
    """A late one is none: only --fsdp.timeout-minutes ends that wait, with where each stands."""
    lost = start_script(script(tmp_path, LOST), "frozen", 1, world_size=3, log=tmp_path / "log")
    (tmp_path / "late").mkdir()
    codes, text = run_script(script(tmp_path / "late", LOST), "late", 1, world_size=2, log=tmp_path / "late/log")
    assert codes == [1, 1], text
    standing = r"though all are alive: rank 0 in start-up for \d+ s, rank 1 in the evaluation after step 8 for \d+ s"
    assert re.search(standing, text), text
    processes, wait = lost
    for process in processes[::2]:
        process.join(60)
    text = (tmp_path / "log").read_text()
    said = f"error: no sign of life of rank 1 on {platform.node()}: its machine is lost, frozen or cut off. Last seen: "
    assert text.count(said) == text.count("error: ") == 1 and "rank 1 in step 7 for" in text, text
    assert "; of the others: ranks 0, 2 in step 8" in text
    os.kill(processes[1].pid, signal.SIGCONT)
    assert wait()[0] in ([None, 1, None], [None] * 3)  # it finds the others gone


def test_ctrl_c(tmp_path):
    """Also while it imports: of every recipe, and of the tools that users of a recipe need."""
    tools = ("convert_checkpoint", "demo", "download", "inspect_data", "merge_lora", "plot_metrics")
    for file in [*ROOT.glob("recipes/*.py"), *(ROOT / f"tools/{name}.py" for name in tools)]:
        text = file.read_text()
        assert "".join(text.splitlines(True)[ast.parse(text).body[0].end_lineno :]).startswith(START), file
    own = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored"
    file = script(tmp_path, own + START + INTERRUPTED)
    assert run_script(file, "importing", log=tmp_path / "log") == ([None], "")  # ended by the signal: 130 in a shell
    codes, text = run_script(file, "running", log=tmp_path / "log")
    assert codes == [130] and text.endswith("\ninterrupted\n") and "Traceback" not in text


STREAMS = """
import os, runpy, sys
here, recipe, model = sys.argv[1:]
def attempt(name, *flags):
    sys.argv = [recipe, "--model", model, "--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "3", *flags]
    try:
        yield
        runpy.run_path(recipe, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        code = repr(error)
    sys.stdout = open(1, "w", closefd=False)
    os.write(1, f"{name}: {code}\\n".encode())
for _ in attempt("head", "--prompt", "a"):
    read, write = os.pipe()
    os.close(read)
    sys.stdout = open(write, "w")
for _ in attempt("no stdin", "--chat"):
    sys.stdin = None
for _ in attempt("ascii", "--prompt", "\\u00e9"):
    sys.stdin = open(os.devnull)
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
for _ in attempt("no stderr", "--prompt", "a"):
    sys.stderr = None
"""


def test_streams_that_are_closed(tiny_folder, tmp_path):
    recipe = ROOT / "recipes/generate.py"
    codes, text = run_script(script(tmp_path, STREAMS), tmp_path, recipe, tiny_folder, log=tmp_path / "log")
    assert codes == [0] and "Traceback" not in text and "Exception ignored" not in text, text
    for said in ("head: 141", "no stdin: 0", "ascii: 0", "no stderr: 0"):
        assert said in text, text


def test_who_looks_for_missing_ranks_is_not_missed():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    heart = Heartbeat(store, 0, 2, 0.6, print)
    heart.over.set()  # no thread gives signs, as while one of them looks
    for thread in heart.threads:
        thread.join()
    heart.over.clear()
    store.set("minillama/sign/1", "1\t0\tfar\tstep 3")
    before = heart.count
    ranks, text = heart.missing()
    assert ranks == [1] and "no sign of life of rank 1 on far: its machine is lost" in text
    assert heart.count - before >= 2.5, "signs of 2.5 looks"


class SlowStore:
    """A store that takes a while to note what other threads set."""

    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        return getattr(self.store, name)

    def set(self, key, value):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.2)
        self.store.set(key, value)


def test_no_sign_comes_after_the_end():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    heart = Heartbeat(store, 0, 2, 0.6, print)
    heart.store = SlowStore(heart.store)
    time.sleep(0.15)  # a thread is about to give a sign
    heart.stop()
    time.sleep(0.3)
    assert store.get("minillama/sign/0") == b"ended"
    store.set("minillama/sign/1", "1\t0\tmachine\tstep 7")
    assert heart.missing()[0] == [1]  # a thread that is about to report a rank
    assert store.get("minillama/sign/0") == b"ended"


def test_who_ends_because_of_another_s_error_lets_the_others_know(monkeypatch):
    store, ended = dist.TCPStore("127.0.0.1", 0, is_master=True), threading.Event()
    store.add("minillama/errors", 1)
    monkeypatch.setattr(Heartbeat, "_end", lambda heart, _: (heart.over.set(), ended.set()))
    heart = Heartbeat(store, 0, 2, 0.6, print)
    assert ended.wait(10) and heart.count == 1 + LOOKS  # the sign of its start, and those of lost_seconds
    assert heart._told() == ([], "")


MACHINES = """
import os, platform
platform.node = lambda: f"machine{int(os.environ['RANK']) // 2}"
from minillama.parallel.failures import neighbours
from minillama.parallel.processes import on_each_node, process_group
with process_group("cpu"):
    print(os.environ["RANK"], sorted(neighbours), on_each_node(lambda: os.environ["RANK"]), flush=True)
"""


def test_a_launcher_that_does_not_tell_the_size_of_a_machine(tmp_path):
    codes, text = run_script(script(tmp_path, MACHINES), world_size=3, log=tmp_path / "log", env={"LOCAL_RANK": "0"})
    assert codes == [0] * 3 and sorted(text.splitlines()) == ["0 [0, 1] 0", "1 [0, 1] 0", "2 [2] 2"], text


def test_what_is_no_reason_to_fail(tiny_folder, tmp_path):
    """An adapter of another base, and a plot that cannot be drawn: a warning each, and the run goes on to its end."""
    stranger = save_folder(random_model(1), tmp_path / "stranger")
    config = LoraConfig()
    save_adapter(apply_lora(random_model(1), config), tmp_path / "adapter", config, str(stranger))
    out = tmp_path / "out"
    (out / "loss.png").mkdir(parents=True)
    flags = ["--model", tiny_folder, "--output-dir", out, "--device", "cpu", "--train.max-steps", 1, "--lora.from"]
    flags += [tmp_path / "adapter", "--eval.no-enabled", "--checkpoint.every", -1, "--data.context-length", 512]
    codes, text = run_script(ROOT / "recipes/lora_fsdp.py", *flags, log=tmp_path / "log")
    assert codes == [0] and (out / "adapter/adapter_config.json").exists(), text
    assert text.count("warning: ") == 2 and "error: " not in text
    assert f"adapter was trained on {stranger}, as its adapter_config.json says" in text
    assert "loss.png cannot be used" in text
    made = f"--model {tiny_folder} --adapter {out}/adapter"
    for command in (
        f"recipes/generate.py {made} --template none --prompt TEXT",
        f"recipes/evaluate.py {made} --data.dataset samsum --data.path FILE --data.context-length 512",
        f"tools/merge_lora.py {tiny_folder} {out}/adapter {out}/model",
    ):
        assert text.count(f"\nnext: python {command}\n") == 1
