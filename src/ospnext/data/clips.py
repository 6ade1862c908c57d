"""From a description and what its file holds to a record, or to the reason why there is none."""

from collections.abc import Iterable, Iterator, Mapping

from ospnext.data.annotations import Annotation, BadEntry
from ospnext.data.probe import FileFacts
from ospnext.data.records import FRAME_RATE_TOLERANCE, ClipRecord
from ospnext.data.report import LeftOut, Report
from ospnext.data.workers import Failure

Found = tuple[str, ClipRecord] | LeftOut
"""A clip with where it was described, or why there is none."""


def clips(
    entries: Iterable[Annotation | BadEntry], facts: Mapping[str, FileFacts | Failure], report: Report
) -> Iterator[Found]:
    """Each described clip with where it was described, cut to what its file holds; filters come after.

    Args:
        entries: the descriptions, in their order.
        facts: what each file holds, by path.
        report: is told which facts were described wrongly.
    """
    seen: set[ClipRecord] = set()
    for entry in entries:
        if isinstance(entry, BadEntry):
            yield LeftOut(entry.path, entry.source, "annotation", entry.problem)
            continue
        found = facts[entry.path]
        if isinstance(found, Failure):
            yield LeftOut(entry.path, entry.source, found.reason, found.detail)
            continue
        for fact, example in _differences(entry, found):
            report.correct(fact, example)
        clip = clip_of(entry, found)
        if isinstance(clip, LeftOut):
            yield clip
        elif clip in seen:
            yield LeftOut(entry.path, entry.source, "duplicate", "stands twice")
        else:
            seen.add(clip)
            yield entry.source, clip


def clip_of(entry: Annotation, found: FileFacts) -> ClipRecord | LeftOut:
    """The record of a clip: both ends of its cut and its crop must lie inside the file."""
    end = found.num_frames if entry.end is None else entry.end
    if not 0 <= entry.start < end <= found.num_frames:
        detail = f"[{entry.start}, {end}) of a file of {found.num_frames} frames"
        return LeftOut(entry.path, entry.source, "cut", detail)
    crop = entry.crop
    if crop and not crop.fits(found.height, found.width):
        detail = f"{list(crop)} of a picture of {found.width} x {found.height}"
        return LeftOut(entry.path, entry.source, "crop", detail)
    return ClipRecord(
        entry.path,
        entry.captions,
        found.height,
        found.width,
        found.fps,
        end - entry.start,
        entry.start,
        crop,
        entry.motion,
    )


def _differences(entry: Annotation, found: FileFacts) -> Iterator[tuple[str, str]]:
    """Facts that the description states otherwise than the file: name, and what both say."""
    length = None if entry.end is None else entry.end - entry.start  # some count the frames of the cut
    stated: dict[str, tuple[float | None, float, bool]] = {
        "height": (entry.height, found.height, entry.height == found.height),
        "width": (entry.width, found.width, entry.width == found.width),
        "fps": (entry.fps, found.fps, abs((entry.fps or 0) - found.fps) < FRAME_RATE_TOLERANCE),
        "num_frames": (entry.num_frames, found.num_frames, entry.num_frames in (found.num_frames, length)),
    }
    for fact, (said, real, same) in stated.items():
        if said is not None and not same:
            yield fact, f"{entry.path} ({entry.source}): {said:g} is said, {real:g} is there"
