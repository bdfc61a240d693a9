"""Models of the Hugging Face hub: ORG/NAME to a folder on this machine."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from minillama.errors import UserError
from minillama.formats.hf import INDEX, TOKENIZER_FILES, read_config, read_index
from minillama.formats.meta import is_meta_folder
from minillama.parallel.processes import first_of_ranks, on_each_node, on_rank_zero
from minillama.progress import Lines

HUB_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]+\b", re.ASCII)
"""ORG/NAME, as huggingface_hub's validate_repo_id has it."""
CACHED = re.compile(r"/models--([^/]+)--([^/]+)/snapshots/[0-9a-f]{40}$")
"""The end of the path of a model in huggingface_hub's cache."""
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "original/tokenizer.model",
    INDEX,
    "params.json",
)
"""What we read of a repository besides the weights."""


def find_model(model: str | Path, *, weights: bool = True) -> Path:
    """The folder of a model: `model` itself if it exists, else the repository ORG/NAME of the Hugging Face hub.

    The files that we read are downloaded into huggingface_hub's cache, unless they are there: all, or all but the
    weights. A path that does not exist, and is not ORG/NAME or has a folder ORG, is returned too: reading it will say what
    is wrong. In a process group every rank must call it: the first process of each machine downloads while the
    others wait, however long that takes.

    Raises UserError, with what to do, if the download fails, and before any weights for a model that is not a Llama.
    """
    model = Path(model)
    if not HUB_ID.fullmatch(model.as_posix()):
        return model
    if not dist.is_initialized():
        return _find(model, weights)
    folder = on_each_node(lambda: _find(model, weights))
    first = on_rank_zero(lambda: folder.name)  # of a repository: the commit
    if other := first_of_ranks(folder.name if folder.name != first else None):
        found = ", ".join(sorted([first, other]))
        raise UserError(f"the machines have different versions of {model}: {found}; give all of them the same folder")
    return folder


def model_name(folder: Path) -> str:
    """A model's name: ORG/NAME if the folder is in huggingface_hub's cache, else its path as given."""
    cached = CACHED.search(folder.as_posix())
    return "/".join(cached.groups()) if cached else str(folder)


def weight_files(folder: Path, repo: str) -> list[list[str]]:
    """Patterns of the names of the weight files: the first list that matches a file counts. folder: has the small files of
    `repo`.

    Raises UserError for what is not a Llama, in Hugging Face's format or Meta's.
    """
    if is_meta_folder(folder):
        return [["consolidated.*.pth"]]
    if not (folder / "config.json").exists():
        raise UserError(f"{repo} holds no model: neither config.json nor Meta's params.json (a GGUF file? an adapter?)")
    read_config(folder)
    shards = [sorted(set(read_index(folder / INDEX).values()))] if (folder / INDEX).exists() else []
    return [["model.safetensors"], *shards]


def check_found(repo: str, weights: list[str]) -> None:
    if not weights:
        raise UserError(f"{repo} has neither *.safetensors nor Meta's consolidated.*.pth: choose a repository that has")


@contextmanager
def explained(repo: str, revision: str = "main", local: str = "") -> Iterator[None]:
    """Turns what huggingface_hub raises inside into UserErrors. local: what else the name might have meant."""
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        raise UserError(f'{local}downloading {repo} needs a package: pip install -e ".[hub]"') from None
    page = f"{constants.ENDPOINT}/{repo}"
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        raise UserError(f"{page} is gated: accept its licence on that page, then {login}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{local}no repository {page} that you may see: check the name; if private, {login}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{page} has no revision {revision}") from None
    except Exception as error:  # the connection, the disk, the server: each library below has types of its own
        offline = isinstance(error, errors.LocalEntryNotFoundError)
        cause = error.__cause__ or error if offline else error
        if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code in (401, 403):
            text = f"{page} refuses the token ({cause.server_message}): {login}"
        elif offline:
            reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _first_line(cause)
            text = (
                f"{local}{page} cannot be asked ({reason}), and {constants.HF_HUB_CACHE} does not hold all of it: download "
                "it where there is a network, and copy that folder or give --model a local folder"
            )
        elif isinstance(error, errors.OfflineModeIsEnabled):
            text = f"{page} cannot be asked (HF_HUB_OFFLINE is set): unset it, or copy the model's folder here"
        elif isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            text = (
                f"{repo} is not whole, the disk is full: free some space; huggingface_hub's cache is where HF_HOME says"
            )
        else:
            text = f"{repo} could not be downloaded ({_first_line(cause)}): give the same command again, what is whole stays"
        raise UserError(text) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]


def _find(model: Path, weights: bool) -> Path:
    if model.exists() or model.parent.exists():
        return model
    repo = model.as_posix()
    with explained(repo, local=f"there is no folder {repo} here, and "):
        from huggingface_hub import snapshot_download

        bar = None if sys.stderr.isatty() else Lines  # None: huggingface_hub's own
        folder = Path(snapshot_download(repo, allow_patterns=list(SMALL_FILES), tqdm_class=bar))
        if weights:
            found: list[str] = []
            for patterns in weight_files(folder, repo):
                snapshot_download(repo, revision=folder.name, allow_patterns=[*SMALL_FILES, *patterns], tqdm_class=bar)
                if found := [file.name for pattern in patterns for file in folder.glob(pattern)]:
                    break
            check_found(repo, found)
    return folder
