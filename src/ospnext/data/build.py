"""``ospnext data build``: from descriptions of videos to a store of the clips that training can use.

    ospnext data build configs/data/filter.yaml ann_txt_path=all_videos.txt save_path=data/clips
    ospnext data build data_path=my_videos save_path=data/clips sample_height=480 sample_width=832

Every file is opened and what it holds is believed over what is said of it. What was found is kept in ``probes.jsonl``
beside the store, by path, size and time of change: a build that was killed goes on where it was, and one with other
filters opens nothing again. The store is replaced in one step when all is done.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, Self, TypeVar

from pydantic import Field, model_validator

from ospnext.config import ConfigError
from ospnext.data.annotations import Annotation, BadEntry, Columns, read_data, read_index
from ospnext.data.clips import Found, clips
from ospnext.data.filters import FilterConfig, first_failure, motion
from ospnext.data.journal import Journal, file_key
from ospnext.data.motion import MotionTask, measure, require_opencv
from ospnext.data.probe import FileFacts, ProbeError, probe
from ospnext.data.records import ClipRecord
from ospnext.data.report import LeftOut, Report, print_report, replacing, write_report
from ospnext.data.store import write_store
from ospnext.data.workers import Failure, Outcome, default_workers, run_tasks

T = TypeVar("T")
R = TypeVar("R")


class BuildConfig(FilterConfig):
    """``ospnext data build``: a store of clips from descriptions of videos."""

    alternatives: ClassVar[tuple[str, ...]] = ("ann_txt_path", "data_path")

    ann_txt_path: str | None = Field(None, description="an index: a line `folder of videos,meta JSON` for each corpus")
    data_path: str | None = Field(
        None, description="a folder of videos with .txt captions, or a .json/.jsonl/.csv/.tsv"
    )
    save_path: str = Field(min_length=1, description="folder of the store; training's metafile_or_dir_path")
    save_absolute_path: bool = Field(True, description="false: keep paths relative to save_path, to move both together")
    videos_root: str | None = Field(None, description="where relative paths of data_path begin; default: beside it")
    video_column: str | None = Field(None, description="column of the video; default: path, video, file_name ...")
    caption_column: str | None = Field(
        None, description="column of the caption; default: cap, caption, prompt, text ..."
    )
    measure_motion: bool = Field(False, description="measure the motion of clips that come without (needs opencv)")
    decode_all: bool = Field(False, description="decode every frame of every file: slow, finds damage inside files")
    workers: int | None = Field(None, ge=1, description="processes that read files; default: one a core")
    timeout: float = Field(60.0, gt=0, description="seconds a file may take; then it is set aside")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.ann_txt_path is None and self.data_path is None:
            raise ValueError("ann_txt_path and data_path are both empty: give one")
        return self


def run(config: BuildConfig) -> str:
    """Build the store; returns the line to print.

    Raises:
        ConfigError: the descriptions cannot be read, or no clip is left (the old store stays as it is).
        OSError: ``save_path`` cannot be written.
    """
    if config.measure_motion:
        require_opencv()
    folder, report = Path(config.save_path).absolute(), Report()
    if not (entries := list(_entries(config))):
        raise ConfigError(f"{config.ann_txt_path or config.data_path}: describes no clips")
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / "probes.jsonl") as journal:
        facts = _probe_all(sorted({e.path for e in entries if isinstance(e, Annotation)}), config, journal)
        found = list(clips(entries, facts, report))
        if config.measure_motion:
            found = _with_motion(found, config, journal)
    kept = list(_choose(found, config, report, folder / "left_out.jsonl"))
    fingerprint = write_store(folder, kept, config.save_absolute_path) if kept else None
    write_report(report, folder, fingerprint, config.model_dump(mode="json"))
    print_report(report)
    if not kept:
        raise ConfigError(f"no clip of {report.total} is left, nothing was written: see {folder / 'report.json'}")
    return f"wrote {folder}: {report.kept} of {report.total} clips, {report.seconds / 3600:.2f} hours; see report.json"


def _choose(found: Iterable[Found], config: FilterConfig, report: Report, left_out: Path) -> Iterator[ClipRecord]:
    """The clips that pass every filter; the others go to the file ``left_out``, all to the report."""
    with replacing(left_out) as file:
        for item in found:
            if not isinstance(item, LeftOut):
                source, clip = item
                failure = first_failure(clip, config)
                if failure is None:
                    report.keep(clip)
                    yield clip
                    continue
                item = LeftOut(clip.path, source, *failure)
            report.leave_out(item)
            file.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")


def _entries(config: BuildConfig) -> Iterator[Annotation | BadEntry]:
    columns = Columns(config.video_column, config.caption_column)
    if config.ann_txt_path is not None:
        return read_index(config.ann_txt_path, columns)
    return read_data(config.data_path or "", config.videos_root, columns)


class ProbeTask(NamedTuple):
    """A file to read."""

    path: str
    decode_all: bool


def probe_task(task: ProbeTask) -> FileFacts | Failure:
    """``probe`` whose errors are values, for another process."""
    try:
        return probe(task.path, task.decode_all)
    except ProbeError as error:
        return Failure(error.reason, error.detail)


def _probe_all(paths: list[str], config: BuildConfig, journal: Journal) -> dict[str, FileFacts | Failure]:
    """What each file holds, from the journal where it still holds true, else read now."""
    keys = {path: file_key(path, "decode_all" if config.decode_all else "ends") for path in paths}
    facts = {path: known for path in paths if not isinstance(known := journal.get(keys[path]), float | None)}
    tasks = [ProbeTask(path, config.decode_all) for path in paths if path not in facts]
    outcomes = run_tasks(probe_task, tasks, config.workers or default_workers(), config.timeout)
    for task, result in progress(outcomes, "reading files", len(tasks)):
        facts[task.path] = result
        journal.put(keys[task.path], result)
    return facts


def _with_motion(found: list[Found], config: BuildConfig, journal: Journal) -> list[Found]:
    """``found`` with the motion of each clip that has none and that no other rule drops."""
    tasks: dict[int, MotionTask] = {}
    for i, item in enumerate(found):
        if (
            not isinstance(item, LeftOut)
            and item[1].motion is None
            and first_failure(item[1], config, skip=motion) is None
        ):
            tasks[i] = MotionTask(item[1], config.interval(item[1].fps))
    keys = {
        task: file_key(task.clip.path, f"motion {task.clip.start} {task.clip.num_frames} {task.interval:.6g}")
        for task in tasks.values()
    }
    values = {task: known for task, key in keys.items() if isinstance(known := journal.get(key), float | Failure)}
    outcomes = run_tasks(
        measure,
        todo := [task for task in keys if task not in values],
        config.workers or default_workers(),
        config.timeout,
    )
    for task, value in progress(outcomes, "measuring motion", len(todo)):
        values[task] = value
        journal.put(keys[task], value)
    return [
        _moved(item, values[tasks[i]]) if i in tasks and not isinstance(item, LeftOut) else item
        for i, item in enumerate(found)
    ]


def _moved(item: tuple[str, ClipRecord], value: float | Failure) -> Found:
    source, clip = item
    if isinstance(value, Failure):
        return LeftOut(clip.path, source, value.reason, value.detail)
    return source, replace(clip, motion=value)


def progress(outcomes: Iterator[Outcome[T, R]], what: str, total: int) -> Iterator[Outcome[T, R]]:
    """``outcomes`` as they come, with a bar on the terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not total or not console.is_terminal
    return iter(track(outcomes, f"{what}:", total, console=console, transient=True, disable=hidden))
