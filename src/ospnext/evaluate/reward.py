"""``ospnext evaluate reward DIR``: what rewards say of a folder of videos, as JSON.

The prompt of a video is what ``manifest.json`` of ``ospnext generate`` says, else the text file beside it
(``clip.txt`` for ``clip.mp4``), else the line of ``prompts`` at the video's place among all, in the order of their
numbers; else it is empty, which some rewards do not mind. A line of JSON beside it (``clip.json``) is its metadata.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.progress import track

from ospnext.config import Config, ConfigError
from ospnext.device import resolve_device
from ospnext.generate.manifest import FILE as MANIFEST
from ospnext.generate.manifest import write_text
from ospnext.generate.settings import read_prompt_file
from ospnext.media import read_video
from ospnext.rewards.base import RewardSet, check_reward, needs
from ospnext.rewards.settings import RewardConfig

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
GRID = "video_grid"  # all videos once more


class EvaluateRewardConfig(Config):
    """``ospnext evaluate reward``: which videos, which rewards."""

    folder: str = Field(min_length=1, description="videos, such as the output of generate")
    reward_fn: dict[str, float] = Field(min_length=1, description="weights of rewards by name")
    reward_config: RewardConfig = RewardConfig()
    prompts: str | None = Field(default=None, description="a file with a prompt per line, in the order of the videos")
    output: str | None = Field(default=None, description="where the JSON goes; default: rewards.json in the folder")


def run(config: EvaluateRewardConfig) -> str:
    """Score, write the JSON; returns a line with the means.

    Raises:
        ValueError: no videos, prompts or metadata that do not fit, a reward that cannot be had; nothing is written.
    """
    made = config.reward_config
    for name in config.reward_fn:
        check_reward(name, made.options.get(name, {}))
    folder = Path(config.folder)
    videos = find_videos(folder)
    prompts = find_prompts(folder, videos, config.prompts)
    metadata = find_metadata(videos, config.reward_fn)
    device = resolve_device("auto" if made.device is None else made.device)
    rewards = RewardSet(config.reward_fn, made.options, device, made.separate)
    rows: list[dict[str, Any]] = []
    try:
        for path in track(videos, description="scoring", transient=True):
            clip = read_video(path)
            frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)[None].float() / 255
            about = {"fps": clip.fps} | metadata[path.name]
            scored = rewards(frames, [prompts[path.name]], [about])
            each = {name: plain(float(values[0])) for name, values in scored.each.items()}
            rows.append(
                {"file": path.name, "prompt": prompts[path.name], "score": plain(float(scored.total[0])), **each}
            )
    finally:
        rewards.close()
    names = dict.fromkeys(name for row in rows for name in row if name not in ("file", "prompt"))
    means = {name: mean([row.get(name) for row in rows]) for name in names}
    result = {"reward_fn": config.reward_fn, "mean": means, "failures": rewards.failures, "videos": rows}
    output = folder / "rewards.json" if config.output is None else Path(config.output)
    write_text(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    said = ", ".join(f"{name} {'none' if value is None else f'{value:.4g}'}" for name, value in means.items())
    return f"{len(rows)} videos: {said}; saved {output}"


def find_videos(folder: Path) -> list[Path]:
    """All videos of a folder, ``video_2`` before ``video_10``.

    Raises:
        ConfigError: there are none.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.stem != GRID and p.name[0] != "."]
    if not found:
        raise ConfigError(f"{folder} holds no videos ({', '.join(SUFFIXES)})")
    return sorted(
        found, key=lambda path: [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", path.name)]
    )


def find_prompts(folder: Path, videos: list[Path], file: str | None) -> dict[str, str]:
    """The prompt of every video by its name.

    Raises:
        ConfigError: ``file`` holds another number of prompts.
    """
    if file is not None:
        lines = read_prompt_file(file)
        if len(lines) != len(videos):
            raise ConfigError(f"{file} holds {len(lines)} prompts for {len(videos)} videos: give one for each")
        return {path.name: line for path, line in zip(videos, lines, strict=True)}
    said: dict[str, str] = {}
    if (folder / MANIFEST).is_file():
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("videos", [])
        said = {one["file"]: one["prompt"] for one in listed}
    for path in videos:
        beside = path.with_suffix(".txt")
        if path.name not in said:
            said[path.name] = beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""
    return said


def find_metadata(videos: Sequence[Path], rewards: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What ``clip.json`` beside ``clip.mp4`` says, by the name of the video.

    Raises:
        ConfigError: it is no mapping in JSON, or lacks what a reward needs.
    """
    found: dict[str, dict[str, Any]] = {}
    for video in videos:
        beside = video.with_suffix(".json")
        try:
            said = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{beside} is no JSON: {error}") from error
        if not isinstance(said, dict):
            raise ConfigError(f"{beside} must hold a mapping, such as {{}}, not {type(said).__name__}")
        for name in rewards:
            if missing := [key for key in needs(name) if key not in said]:
                raise ConfigError(
                    f"reward {name!r} needs {', '.join(missing)} of every video, and {video.name} has none: write "
                    f"a mapping with it to {beside}"
                )
        found[video.name] = said
    return found


def mean(values: list[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 6) if known else None


def plain(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 6) if math.isfinite(value) else None
