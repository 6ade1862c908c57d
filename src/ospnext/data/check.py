"""``ospnext data check STORE``: decode a sample of its clips and draw it, each with its caption.

    ospnext data check data/clips num_clips=32 seed=1

Of each clip the first, the middle and the last frame are read and its size is held against the store. What a picture
cannot show is said in words; a clip that does not decode makes the command fail, after the sheet is written.
"""

import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pydantic import Field

from ospnext.config import Config
from ospnext.data.build import progress
from ospnext.data.probe import ProbeError, display_size, opened
from ospnext.data.records import ClipRecord
from ospnext.data.store import ClipStore, StoreError
from ospnext.data.workers import Failure, default_workers, run_tasks
from ospnext.media import contact_sheet

TILE = (240, 160)  # pixels of one frame in the sheet: width, height
_LINES, _LINE = 3, 14  # of a caption, and pixels of one


class CheckConfig(Config):
    """``ospnext data check``: does a store hold what it says?"""

    store: str = Field(min_length=1, description="the folder of the store")
    num_clips: int = Field(16, ge=1, description="clips to decode, chosen at random")
    seed: int = Field(0, ge=0, description="of the choice")
    output: str | None = Field(None, description="the picture to write; default: check.png in the store's folder")
    timeout: float = Field(60.0, gt=0, description="seconds a clip may take")
    workers: int | None = Field(None, ge=1, description="processes that decode; default: one a core")


def run(config: CheckConfig) -> str:
    """Check as configured; returns the line to print.

    Raises:
        StoreError: there is no store, or clips of the sample do not decode; the sheet is there all the same.
        OSError: the sheet cannot be written.
    """
    store = ClipStore(config.store)
    chosen = np.random.default_rng(config.seed).permutation(len(store))[: config.num_clips]
    clips = [store[int(i)] for i in sorted(chosen)]
    outcomes = run_tasks(thumbnails, clips, config.workers or default_workers(), config.timeout)
    found = dict(progress(outcomes, "decoding clips", len(clips)))
    sheet = Path(config.output) if config.output else store.path / "check.png"
    contact_sheet(np.concatenate([_row(clip, found[clip]) for clip in clips]), sheet, columns=3)
    failures = [f"{clip.path} ({f.reason}: {f.detail})" for clip in clips if isinstance(f := found[clip], Failure)]
    if failures:
        raise StoreError(f"{len(failures)} of {len(clips)} clips do not decode: {'; '.join(failures[:5])}; see {sheet}")
    return f"{len(clips)} of {len(store)} clips were decoded, all are sound; see {sheet}"


class Thumbnails(NamedTuple):
    """The first, the middle and the last frame of a clip, each uint8 [H, W, 3]."""

    frames: tuple[np.ndarray, ...]


def thumbnails(clip: ClipRecord) -> Thumbnails | Failure:
    """Decode ``clip`` to its end and keep three frames, cropped and scaled to a tile."""
    wanted = (clip.start, clip.start + (clip.num_frames - 1) // 2, clip.start + clip.num_frames - 1)
    frames: list[np.ndarray] = []
    try:
        with opened(clip.path) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if number not in wanted:
                    continue
                size = display_size(frame.height, frame.width, stream.sample_aspect_ratio, frame.rotation)
                if size != (clip.height, clip.width):
                    detail = f"{size[0]} x {size[1]}, not {clip.height} x {clip.width}"
                    return Failure("unreadable", f"frame {number} has another size than the store says: {detail}")
                frames += [_thumbnail(frame.to_ndarray(format="rgb24"), frame.rotation, clip)] * wanted.count(number)
                if number == wanted[-1]:
                    return Thumbnails(tuple(frames))
    except ProbeError as error:
        return Failure(error.reason, error.detail)
    except OSError as error:
        return Failure("missing", error.strerror or str(error))
    return Failure("truncated", f"ends before frame {wanted[-1]}")


def _thumbnail(frame: np.ndarray, rotation: int, clip: ClipRecord) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(np.rot90(frame, round(rotation / 90))))
    picture = picture.resize((clip.width, clip.height))
    if clip.crop:
        picture = picture.crop((clip.crop.x0, clip.crop.y0, clip.crop.x1, clip.crop.y1))
    return np.asarray(ImageOps.contain(picture, TILE))


def _row(clip: ClipRecord, found: Thumbnails | Failure) -> np.ndarray:
    """Three tiles with a line on the file below the first, and the first caption below all: uint8 [3, H, W, 3]."""
    width, height = TILE
    strip = Image.new("RGB", (3 * width, height + (_LINES + 1) * _LINE), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(11)
    if isinstance(found, Failure):
        draw.multiline_text((4, 4), textwrap.fill(f"{found.reason}: {found.detail}", 90), fill="#b00020", font=font)
    else:
        for place, frame in enumerate(found.frames):
            strip.paste(Image.fromarray(frame), (place * width, 0))
    facts = f"{Path(clip.path).name}  [{clip.start}, {clip.start + clip.num_frames})  {clip.width} x {clip.height}"
    draw.text((4, height), f"{facts}  {clip.fps:.4g} fps  {len(clip.captions)} captions", fill="#555555", font=font)
    text = textwrap.wrap(clip.captions[0] if clip.captions else "no caption", 110, max_lines=_LINES, placeholder=" ...")
    for line, words in enumerate(text, 1):
        draw.text((4, height + line * _LINE), words, fill="black", font=font)
    return np.stack(np.split(np.asarray(strip), 3, axis=1))
