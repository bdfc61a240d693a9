"""Draws what tools/bench.py wrote: python tools/bench_parts/plot.py RESULTS.json FILE.png"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(cases: list[dict[str, Any]], file: Path, memory_only: bool) -> None:
    """Tokens per second and peak memory of each case; or peak memory alone, over the context length."""
    panels = {"tokens/s": lambda r: r["tokens_per_s"]["median"], "peak memory, GiB": lambda r: r["peak_gib"]}
    if memory_only:
        del panels["tokens/s"]
    names = [name for name in ("ours", "hf", "torchtune") if any(name in case["contenders"] for case in cases)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (title, number) in zip(axes[0], panels.items(), strict=True):
        for position, name in enumerate(names):
            at, height = [], []
            for place, case in enumerate(cases):
                if "error" not in (result := case["contenders"].get(name, {"error": ""})):
                    at.append(case["context_length"] if memory_only else place + position * 0.8 / len(names))
                    height.append(number(result))
            if memory_only:
                axis.plot(at, height, "o-", label=name)
            else:
                axis.bar(at, height, 0.8 / len(names), align="edge", label=name)
        if memory_only:
            axis.set_xlabel("context length, tokens")
            axis.set_ylim(bottom=0)
        else:
            labels = [f"{case['shape']}\n{case['method']} {case['context_length']}" for case in cases]
            axis.set_xticks([place + 0.4 for place in range(len(cases))], labels, rotation=45, fontsize=7)
        axis.set_title(title)
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text())
    draw(results["cases"], Path(sys.argv[2]), results["settings"]["memory_sweep"])
