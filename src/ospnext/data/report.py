"""What a build did, for people and programs: ``report.json``, ``report.png``, ``left_out.jsonl`` and a table."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ospnext.data.filters import RULES
from ospnext.data.journal import naming
from ospnext.data.probe import FAULTS
from ospnext.data.records import ClipRecord

EXAMPLES = 5
BINS = 24
MEANINGS = {
    "annotation": "the description has the form of one",
    "duplicate": "the same clip with the same captions does not stand before it",
    "cut": "0 <= start < end <= frames of the file",
    "crop": "0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, as displayed",
    **{rule.__name__: " ".join((rule.__doc__ or "").split()) for rule in RULES},
}
"""Every rule a clip is dropped by, with what it asks for."""

_PANEL, _MARGIN = (360, 200), 28  # pixels of one histogram and around it


@dataclass(frozen=True)
class LeftOut:
    """A clip that is not in the store.

    Attributes:
        path: of the file.
        source: where it was described.
        rule: a key of ``MEANINGS`` or of ``FAULTS``.
        detail: what was found.
    """

    path: str
    source: str
    rule: str
    detail: str


@dataclass
class Tally:
    """How many, and the first few."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class Report:
    """Counts of one build, filled clip by clip.

    Attributes:
        dropped: by rule, see ``MEANINGS``.
        quarantined: files that cannot be used, by reason, see ``FAULTS``; counted in clips.
        corrected: facts that were described otherwise than the file has them; the file was believed.
    """

    kept: int = 0
    seconds: float = 0.0
    dropped: dict[str, Tally] = field(default_factory=dict)
    quarantined: dict[str, Tally] = field(default_factory=dict)
    corrected: dict[str, Tally] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All clips that were described."""
        return self.kept + sum(tally.count for tally in (*self.dropped.values(), *self.quarantined.values()))

    def keep(self, clip: ClipRecord) -> None:
        """Count a clip of the store."""
        self.kept += 1
        self.seconds += clip.num_frames / clip.fps
        for name, value in (
            ("seconds", clip.num_frames / clip.fps),
            ("frames", clip.num_frames),
            ("frames per second", clip.fps),
            ("height", clip.height),
            ("width", clip.width),
            ("height / width", clip.height / clip.width),
            ("motion", clip.motion),
            ("words of a caption", float(np.mean([len(text.split()) for text in clip.captions]))),
        ):
            if value is not None:
                self.values.setdefault(name, []).append(float(value))

    def leave_out(self, left: LeftOut) -> None:
        """Count a clip that is not in the store."""
        group = self.quarantined if left.rule in FAULTS else self.dropped
        group.setdefault(left.rule, Tally()).add(f"{left.path} ({left.source}): {left.detail}")

    def correct(self, fact: str, example: str) -> None:
        """Count a fact of a file that was described otherwise."""
        self.corrected.setdefault(fact, Tally()).add(example)

    def to_json(self, fingerprint: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Everything as plain values; ``fingerprint`` is that of the store it speaks of, None if none was written."""
        return {
            "store": fingerprint,
            "total": self.total,
            "kept": self.kept,
            "hours": round(self.seconds / 3600, 4),
            "dropped": {
                rule: {"count": t.count, "rule": MEANINGS[rule], "examples": t.examples}
                for rule, t in _ordered(self.dropped, MEANINGS)
            },
            "quarantined": {
                reason: {"count": t.count, "meaning": FAULTS[reason], "examples": t.examples}
                for reason, t in _ordered(self.quarantined, FAULTS)
            },
            "corrected": {fact: {"count": t.count, "examples": t.examples} for fact, t in self.corrected.items()},
            "histograms": {name: _histogram(values) for name, values in self.values.items()},
            "settings": dict(settings),
        }


def print_report(report: Report) -> None:
    """Show the counts as a table on the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, options in (("clips", {"justify": "right"}), ("", {"no_wrap": True}), ("for example", {})):
        table.add_column(name, **options)
    table.add_row(str(report.total), "described", "")
    for title, group, meanings in (
        ("dropped", report.dropped, MEANINGS),
        ("quarantined", report.quarantined, FAULTS),
    ):
        for rule, tally in _ordered(group, meanings):
            table.add_row(str(tally.count), f"{title}: {rule}", escape(_printable(tally.examples[0])))
    table.add_row(str(report.kept), "kept", f"{report.seconds / 3600:.2f} hours")
    for fact, tally in report.corrected.items():
        table.add_row(str(tally.count), f"corrected: {fact}", escape(_printable(tally.examples[0])))
    Console(highlight=False, stderr=True).print(table)


def _printable(text: str) -> str:
    """``text`` without signs that would steer the terminal; a file may have them in its name."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def write_report(report: Report, folder: Path, fingerprint: str | None, settings: Mapping[str, Any]) -> None:
    """Write ``report.json`` and, of the clips that were kept, ``report.png``.

    Raises:
        OSError: the folder cannot be written.
    """
    with replacing(folder / "report.json") as file:
        json.dump(report.to_json(fingerprint, settings), file, ensure_ascii=False, indent=2)
    if report.kept:
        partial = folder / f".report.png.{os.getpid()}"
        try:
            with naming(folder / "report.png"):
                _picture(report).save(partial, format="PNG")
            os.replace(partial, folder / "report.png")
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of ``path`` when the block ends, and leaves it alone when it fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path), open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _ordered(group: Mapping[str, Tally], order: Mapping[str, str]) -> list[tuple[str, Tally]]:
    return [(name, group[name]) for name in order if name in group]


def _histogram(values: list[float]) -> dict[str, list[float]]:
    """Counts in ``BINS`` equal steps, with the edges between them."""
    counts, edges = np.histogram(values, bins=BINS)
    return {"counts": counts.tolist(), "edges": [round(edge, 4) for edge in edges.tolist()]}


def _picture(report: Report) -> Image.Image:
    """One histogram for each quantity, two to a row."""
    (width, height), rows = _PANEL, -(-len(report.values) // 2)
    picture = Image.new("RGB", (2 * width, rows * height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for place, (name, values) in enumerate(report.values.items()):
        left, top = place % 2 * width + _MARGIN, place // 2 * height + _MARGIN
        right, bottom = left + width - 2 * _MARGIN, top + height - 2 * _MARGIN
        histogram = _histogram(values)
        step, most = (right - left) / BINS, max(histogram["counts"])
        for i, count in enumerate(histogram["counts"]):
            if count:
                x = left + i * step
                draw.rectangle((x, bottom - count / most * (bottom - top), x + step - 2, bottom), fill="#3b6ea5")
        draw.line((left, bottom, right, bottom), fill="#888888")
        draw.text((left, top - 20), f"{name} (median {np.median(values):.4g})", fill="black", font=font)
        draw.text((left, bottom + 4), f"{histogram['edges'][0]:.4g}", fill="#444444", font=font)
        draw.text((right, bottom + 4), f"{histogram['edges'][-1]:.4g}", fill="#444444", font=font, anchor="ra")
    return picture
