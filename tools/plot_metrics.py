"""Draws loss.png of a run: python tools/plot_metrics.py OUTPUT_DIR"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from minillama.errors import UserError
from minillama.metrics import plot_loss


@dataclass(frozen=True)
class Args:
    """Training and validation loss of a run, drawn to OUTPUT_DIR/loss.png."""

    output_dir: tyro.conf.Positional[Path]
    """The output folder of a run, with its metrics.jsonl."""


def main(args: Args) -> None:
    metrics, image = args.output_dir / "metrics.jsonl", args.output_dir / "loss.png"
    if not metrics.exists():
        raise UserError(f"{metrics} does not exist: give the --output-dir of a run")
    if not plot_loss(metrics, image):
        raise UserError('drawing needs matplotlib: pip install "minillama[plot]"')
    print(image)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UserError as error:
        sys.exit(f"error: {error}")
