"""``ospnext data check STORE``: decode a sample of its clips and draw it, each with its caption.

    ospnext data check data/clips num_clips=32 seed=1

The store itself is held against its fingerprint. Of each clip in the sample every frame is decoded; the first, the
middle and the last are drawn, and their size is held against the store. A clip that does not decode stands first in the
sheet and makes the command fail.
"""

from bisect import bisect_right
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

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

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

TILE = (240, 160)  # pixels of one frame in the sheet: width, height
_MOST_ROWS = 200  # of the sheet; those that failed first
_LINES, _LINE = 3, 14  # of a caption, and pixels of one
_FONTS = (  # that know Chinese, as systems name them; the one that Pillow brings knows Latin letters only
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "PingFang.ttc",
    "msyh.ttc",
    "Arial Unicode.ttf",
)


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
    if not store.is_whole():
        raise StoreError(
            f"{store.path}: its clips are not those that were written (another fingerprint): build it again"
        )
    chosen = np.random.default_rng(config.seed).permutation(len(store))[: config.num_clips]
    clips = [store[int(i)] for i in sorted(chosen)]
    outcomes = run_tasks(thumbnails, clips, config.workers or default_workers(), config.timeout)
    drawn: dict[ClipRecord, Thumbnails | Failure] = {}
    failed: dict[ClipRecord, Failure] = {}
    for clip, result in progress(outcomes, "decoding clips", len(clips)):
        if isinstance(result, Failure):
            failed[clip] = result
        elif len(drawn) < _MOST_ROWS:
            drawn[clip] = result
    sheet = Path(config.output) if config.output else store.path / "check.png"
    order = {clip: place for place, clip in enumerate(clips)}
    rows = [*sorted(failed.items(), key=lambda item: order[item[0]]), *sorted(drawn.items(), key=lambda i: order[i[0]])]
    contact_sheet(np.stack([_row(clip, found) for clip, found in rows[:_MOST_ROWS]]), sheet, columns=1)
    if failed:
        named = "; ".join(f"{clip.path} ({found.reason}: {found.detail})" for clip, found in list(failed.items())[:5])
        raise StoreError(f"{len(failed)} of {len(clips)} clips do not decode: {named}; see {sheet}")
    installed = isinstance(getattr(_font(11), "path", None), str)
    boxes = not installed and any(sign >= "\u2e80" for clip, _ in rows for text in clip.captions[:1] for sign in text)
    note = " (Chinese is drawn as boxes: install a font for it, such as Noto Sans CJK)" if boxes else ""
    return f"{len(clips)} of {len(store)} clips were decoded, all are sound; see {sheet}{note}"


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
    """Three tiles with a line on the file below the first, and the first caption below all: uint8 [H, W, 3]."""
    width, height = TILE
    strip = Image.new("RGB", (3 * width, height + (_LINES + 1) * _LINE), "white")
    draw, font = ImageDraw.Draw(strip), _font(11)
    if isinstance(found, Failure):
        for line, words in enumerate(_lines(f"{found.reason}: {found.detail}", font, 3 * width - 8, height // _LINE)):
            draw.text((4, 4 + line * _LINE), words, fill="#b00020", font=font)
    else:
        for place, frame in enumerate(found.frames):
            strip.paste(Image.fromarray(frame), (place * width, 0))
    facts = f"{Path(clip.path).name}  [{clip.start}, {clip.start + clip.num_frames})  {clip.width} x {clip.height}"
    draw.text((4, height), f"{facts}  {clip.fps:.4g} fps  {len(clip.captions)} captions", fill="#555555", font=font)
    for line, words in enumerate(_lines(clip.captions[0] if clip.captions else "no caption", font, 3 * width - 8), 1):
        draw.text((4, height + line * _LINE), words, fill="black", font=font)
    return np.asarray(strip)


def _lines(text: str, font: Font, width: int, most: int = _LINES) -> list[str]:
    """``text`` in lines of at most ``width`` pixels, broken at spaces where there are some (Chinese has none)."""
    lines: list[str] = []
    rest = " ".join(text[:2000].split())
    while rest and len(lines) < most:
        fits = bisect_right(range(1, len(rest) + 1), width, key=lambda count: font.getlength(rest[:count])) or 1
        if fits < len(rest) and (space := rest.rfind(" ", fits // 2, fits + 1)) > 0:
            fits = space
        lines.append(rest[:fits])
        rest = rest[fits:].lstrip()
    if rest:
        lines[-1] = lines[-1][:-4] + " ..."
    return lines


@cache
def _font(size: int) -> Font:
    """The first of ``_FONTS`` that is installed, else the one that Pillow brings."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
