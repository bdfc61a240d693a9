"""Downloads a model of the Hugging Face hub to a folder of its own: only the files that are needed.

    python tools/download.py meta-llama/Llama-3.2-1B                        to models/Llama-3.2-1B
    python tools/download.py meta-llama/Llama-3.2-1B /data/1B --revision 4e20de3

The folder appears when it is complete and every file has the hub's hash. Until then the files are in TARGET.download. If it
is interrupted, the same command goes on at the byte where it stopped. (The recipes' --model ORG/NAME downloads too, into
huggingface_hub's cache, which starts an interrupted file from scratch.)
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

import hashlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import tyro

from minillama.errors import UserError
from minillama.files import is_plain, size_text
from minillama.formats.hub import HUB_ID, SMALL_FILES, check_found, explained, weight_files
from minillama.help import filled
from minillama.parallel.failures import user_errors
from minillama.progress import progress

FILES_AT_ONCE = 4


def download(
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ORG/NAME")],
    target: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TARGET]")] = None,
    *,
    revision: str = "main",
) -> None:
    """Download a model of the Hugging Face hub: config, tokenizer and safetensors, or Meta's files where there are none.

    Args:
        repo: ORG/NAME.
        target: the folder to make; models/NAME if none is given.
        revision: a branch, a tag or a commit.
    """
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"{repo} is not ORG/NAME, as https://huggingface.co has it")
    target = target or Path("models") / repo.partition("/")[2]
    with explained(repo, revision):
        from huggingface_hub import HfApi

        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        listed = {file.rfilename: file for file in info.siblings or ()}
        small = [name for name in listed if name in SMALL_FILES]
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            check_same(repo, target, [listed[name] for name in small])  # before its index is asked for the weights
            weights = find_weights(repo, listed, target)
            check_same(repo, target, [listed[name] for name in weights])
            count = len(small + weights)
            print(f"{target}: complete already, each of its {count} files has the size that the hub says")
            return
        partial = target.with_name(target.name + ".download")
        fetch(repo, info.sha, partial, [listed[name] for name in small])
        weights = find_weights(repo, listed, partial)
        fetch(repo, info.sha, partial, [listed[name] for name in weights])
        names = small + weights
        for file in partial.rglob("*"):
            if file.is_file() and file.relative_to(partial).as_posix() not in names:
                file.unlink()  # of another revision
        partial.replace(target)
    size = sum(listed[name].size or 0 for name in names)
    print(f"{target}: {len(names)} files, {size_text(size)}, {repo} at {info.sha}")
    for name in names:
        print(f"  {name}")
    print(f"next: python recipes/lora_fsdp.py --model {target} --output-dir out/first")


def find_weights(repo: str, listed: dict[str, Any], folder: Path) -> list[str]:
    kinds = weight_files(folder, repo)
    there = [name for name in listed if is_plain(name)]
    found = [[name for name in there if any(fnmatchcase(name, pattern) for pattern in kind)] for kind in kinds]
    names = next(filter(None, found), [])
    check_found(repo, names)
    return names


def check_same(repo: str, target: Path, files: list[Any]) -> None:
    if wrong := [file.rfilename for file in files if not has_size(target / file.rfilename, file.size)]:
        raise UserError(f"{target} exists, and its {wrong[0]} is not that of {repo}: name another target")


def has_size(file: Path, size: int | None) -> bool:
    return file.is_file() and file.stat().st_size == size


def fetch(repo: str, commit: str | None, folder: Path, files: list[Any]) -> None:
    """Downloads the files that model_info lists and the folder lacks, and resumes partial ones."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars

    def part_of(file: Any) -> Path:
        return folder / f"{file.rfilename}.{file.blob_id[:12]}.part"

    def fetch_one(file: Any) -> None:
        whole, part = folder / file.rfilename, part_of(file)
        if has_size(whole, file.size) and is_right(whole, file):
            return
        whole.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as opened:
            begun = opened.tell() if opened.tell() <= file.size else opened.truncate(0)  # two at once wrote to it
            http_get(
                hf_hub_url(repo, file.rfilename, revision=commit),
                Counted(opened, bar),
                resume_size=begun,
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},  # bytes to go on after, not a stream's
                expected_size=file.size,
                displayed_filename=file.rfilename,
            )
        if not is_right(part, file):
            part.unlink()
            raise UserError(
                f"{repo}: {file.rfilename} came with another hash than the hub's: give the same command again"
            )
        part.replace(whole)

    folder.mkdir(parents=True, exist_ok=True)
    there = sum(
        path.stat().st_size for file in files for path in (folder / file.rfilename, part_of(file)) if path.exists()
    )
    missing, free = sum(file.size for file in files) - there, shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(f"{repo} needs {missing / 1e9:.1f} GB more, and the disk of {folder} has {free / 1e9:.1f} GB")
    disable_progress_bars()  # one a file, and only on a terminal
    bar = progress(total=there + missing, initial=there, desc="downloading", unit="B", unit_scale=True, leave=False)
    with bar, ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        try:
            list(pool.map(fetch_one, files))
        except KeyboardInterrupt:
            print("\ninterrupted: the same command goes on from here", file=sys.stderr, flush=True)
            os._exit(130)  # leaving the pool would wait for its files


class Counted:
    """A file that reports what is written to it to a progress bar."""

    def __init__(self, file: BinaryIO, bar: Any) -> None:
        self.file, self.bar = file, bar

    def write(self, content: bytes) -> int:
        self.bar.update(len(content))
        return self.file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def is_right(path: Path, file: Any) -> bool:
    """Whether the content has the hash that the hub lists: Git LFS's SHA-256, or Git's own of small files."""
    with path.open("rb") as opened:
        if file.lfs:
            return hashlib.file_digest(opened, "sha256").hexdigest() == file.lfs.sha256
        content = opened.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id


if __name__ == "__main__":
    with user_errors():
        tyro.cli(filled(download))
