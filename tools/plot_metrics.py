"""Draws loss.png of a run: python tools/plot_metrics.py OUTPUT_DIR"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minillama.errors import UserError
from minillama.help import filled
from minillama.parallel.failures import user_errors
from minillama.training.metrics import plot_loss


@dataclass(frozen=True)
class Args:
    """Training and validation loss of a run, drawn to OUTPUT_DIR/loss.png."""

    output_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT_DIR")]
    """The output folder of a run, with its metrics.jsonl."""


def main(args: Args) -> None:
    metrics, image = args.output_dir / "metrics.jsonl", args.output_dir / "loss.png"
    if not metrics.exists():
        raise UserError(f"{metrics} does not exist: give the output folder of a run")
    if not plot_loss(metrics, image):
        raise UserError("drawing needs matplotlib: pip install matplotlib")
    print(image)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(filled(Args)))
