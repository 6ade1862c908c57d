"""What a run has made: ``manifest.json`` beside the videos. It is what decides what a resumed run may skip.

The file is replaced as a whole after every video, so that a run that is killed loses nothing that it finished.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from ospnext.checkpoints.drafts import locked
from ospnext.config import Config, ConfigError

FILE = "manifest.json"
_WAY_OUT = "choose another output_dir, or overwrite=true"


class VideoTask(NamedTuple):
    """One video to make: its place in the run and all that makes it different from the others."""

    number: int
    prompt: str
    negative_prompt: str | None
    seed: int

    @property
    def file(self) -> str:
        """Name of the video in the output folder."""
        return f"video_{self.number}.mp4"


class _Video(Config, extra="ignore"):
    """What the file must say of a video, besides what else it says."""

    number: int
    prompt: str
    negative_prompt: str | None
    seed: int
    file: str
    decoded: str


class _State(Config, extra="ignore"):
    """What the file must hold."""

    settings: dict[str, Any]
    videos: tuple[_Video, ...]


class Manifest:
    """The videos of an output folder, and the settings they share.

    Args:
        folder: the output folder; it must exist.
        settings: everything a video depends on besides its task; JSON values.
        report: what really runs, by label.
        overwrite: forget what is there.

    Raises:
        ConfigError: the folder holds videos of another run.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], report: Mapping[str, str], overwrite: bool = False
    ) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self.report = dict(report)
        self.videos: dict[str, dict[str, Any]] = {}
        there = None if overwrite else _read(folder / FILE)
        if there is not None:
            changed = [
                f"{key} was {there['settings'].get(key)!r}, now {self.settings.get(key)!r}"
                for key in sorted(there["settings"].keys() | self.settings.keys())
                if there["settings"].get(key) != self.settings.get(key)
            ]
            if changed:
                raise ConfigError(f"{folder} holds videos of other settings ({'; '.join(changed)}): {_WAY_OUT}")
            self.videos = {video["file"]: video for video in there["videos"]}
        elif not overwrite and (strangers := sorted(folder.glob("video_*.mp4"))):
            raise ConfigError(f"{strangers[0]} is there already, without a {FILE} that says what it is: {_WAY_OUT}")

    def has(self, task: VideoTask) -> bool:
        """Whether the task's video is finished.

        Raises:
            ConfigError: a video of another prompt or seed has its name.
        """
        video = self.videos.get(task.file)
        if video is None or not (self.folder / task.file).is_file():
            return False
        for key in ("prompt", "negative_prompt", "seed"):
            if video[key] != getattr(task, key):
                raise ConfigError(
                    f"{self.folder / task.file} has {key} {video[key]!r}, not {getattr(task, key)!r}: {_WAY_OUT}"
                )
        return True

    def add(self, task: VideoTask, **facts: Any) -> None:
        """Record a finished video with further facts about it, and save."""
        self.videos[task.file] = task._asdict() | {"file": task.file} | facts
        self.save()

    def save(self) -> None:
        """Replace the file by the present state."""
        state = {
            "settings": self.settings,
            "report": self.report,
            "videos": sorted(self.videos.values(), key=lambda video: video["number"]),
        }
        write_text(self.folder / FILE, json.dumps(state, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep an output folder to this run alone, and take away what a run that was killed left half written.

    The system lets go of the folder when the process dies. Where a file system knows no locks there is none.

    Raises:
        ConfigError: another run is writing to the folder.
    """
    with ExitStack() as lock:
        try:
            held = lock.enter_context(locked(folder))
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is writing to {folder}: wait for it, or choose another output_dir"
            ) from error
        if held:
            for name in ("video_*.mp4", FILE):
                for partial in folder.glob(f".{name}.*.part"):
                    partial.unlink(missing_ok=True)
        yield


def write_text(path: Path, text: str) -> None:
    """Write a file that is either whole or not there.

    Raises:
        OSError: it cannot be written; names the file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:  # a disk that is full names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        _State.model_validate(state)
    except ValueError as error:
        why = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ConfigError(f"{path} is not a manifest of ospnext ({why}): {_WAY_OUT}") from error
    return dict(state)
