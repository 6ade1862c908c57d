"""A chart of ``dit_step.py``'s cases, each by part beside its floor, from the JSON lines of one or more runs.

    python benchmarks/chart.py step.jsonl --out step.png

Lines that are no JSON (a log's, a table's) are passed over; of a case timed twice the last stands.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # files, no window
import matplotlib.pyplot as plt

LABELS = {
    "peer": "diffusers Wan,\ncompiled",
    "peer_sdpa": "diffusers Wan,\nplain SDPA,\ncompiled",
    "full": "ours, dense",
    "skiparse": "ours, Skiparse",
    "skiparse_compiled": "ours, Skiparse,\ncompiled",
    "skiparse_masked": "Skiparse,\npadded + masked",
}
PARTS = {"attention_ms": "#4c72b0", "linears_ms": "#dd8452", "rest_ms": "#55a868", "idle_ms": "#c9c9c9"}


def read(paths: Iterable[Path]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """Records of timed steps: (model, size) -> case -> record.

    Raises:
        ValueError: there are none.
    """
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line) if line.startswith("{") else {}
            if record.get("benchmark") == "dit_step" and "ms" in record:
                groups.setdefault((record["model"], record["size"]), {})[record["case"]] = record
    if not groups:
        raise ValueError(f"no dit_step records in {', '.join(map(str, paths))}: run benchmarks/dit_step.py > FILE")
    return groups


def draw(axes: Any, cases: dict[str, dict[str, Any]]) -> None:
    """Bars of one network and size in seconds: parts stacked, the floor a line, the ratio to the peer on top."""
    for x, record in enumerate(cases.values()):
        bottom = 0.0
        if "attention_ms" not in record:  # the profiler saw nothing: one bar
            axes.bar(x, record["ms"] / 1e3, 0.7, color="#8c8c8c")
        else:
            # Kernels may sum to a little more or less than the timed call: the bar has the call's height.
            scale = record["ms"] / sum(record[part] for part in PARTS) / 1e3
            for part, colour in PARTS.items():
                label = part.removesuffix("_ms") if x == 0 else None
                axes.bar(x, record[part] * scale, 0.7, bottom=bottom, color=colour, label=label)
                bottom += record[part] * scale
        floor = record["floor_ms"] / 1e3
        axes.plot([x - 0.42, x + 0.42], [floor, floor], color="black", label="floor" if x == 0 else None)
        ratio = f"\n{record['speedup']:.2f}×" if record.get("speedup") else ""
        axes.annotate(f"{record['ms'] / 1e3:.3g} s{ratio}", (x, record["ms"] / 1e3), ha="center", va="bottom")
    axes.set_xticks(range(len(cases)), [LABELS.get(case, case) for case in cases], fontsize=8)
    axes.set_ylim(0, 1.25 * max(record["ms"] for record in cases.values()) / 1e3)  # room for two lines over a bar
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Read the lines, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", type=Path, help="output of dit_step.py")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    arguments = parser.parse_args()
    groups = read(arguments.lines)
    figure, all_axes = plt.subplots(
        1, len(groups), figsize=(1.2 + 4.6 * len(groups), 4.2), layout="constrained", squeeze=False
    )
    for axes, ((model, size), cases) in zip(all_axes[0], groups.items(), strict=True):
        draw(axes, cases)
        last = list(cases.values())[-1]
        fewer = f", {last['layers']} of {last['layers_in_model']} layers" if last["ms_all_layers"] else ""
        axes.set_title(f"{model}, {size}: {last['tokens']:,} tokens{fewer}", fontsize=10)
    all_axes[0][0].set_ylabel("seconds a forward pass")
    all_axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{last['device']}, {last['dtype']}, torch {last['torch']}", fontsize=9)
    figure.savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
