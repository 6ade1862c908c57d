"""Real video files for tests: scenes of the shapes world in every codec and container people have, and damaged ones.

Each frame carries its number as a row of eight black and white blocks in its middle, which survives compression,
rotation by a tag and resizing: ``frame_number`` reads it back from a displayed frame.
"""

import io
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np

from ospnext.shapes.captions import caption
from ospnext.shapes.render import render
from ospnext.shapes.scene import Scene
from ospnext.shapes.world import World, sample_scene

BITS = 8


@dataclass(frozen=True)
class Clip:
    """How one file is made, and what is in it.

    Attributes:
        name: of the file.
        frames, height, width: as displayed.
        fps: average rate of the file.
        ticks: duration of each frame in units of 1/(2 fps), repeated as needed; (2,) is a constant rate.
        rotation: degrees anticlockwise by which a player turns the stored picture, written as a tag.
        sample_aspect: width of a stored pixel by its height.
        after: changes the finished file in place.
    """

    name: str
    frames: int = 48
    height: int = 96
    width: int = 128
    fps: float = 24
    codec: str = "libx264"
    pixels: str = "yuv420p"
    options: Mapping[str, str] = field(default_factory=dict)
    ticks: Sequence[int] = (2,)
    rotation: int = 0
    sample_aspect: Fraction = Fraction(1)
    audio: bool = False
    after: Callable[[Path], None] | None = None

    @property
    def tick_starts(self) -> list[int]:
        """When each frame is shown, in units of 1/(2 fps)."""
        durations = [self.ticks[i % len(self.ticks)] for i in range(self.frames)]
        return [sum(durations[:i]) for i in range(self.frames)]


def _lie_in_avi(path: Path) -> None:
    """Let the headers of an AVI promise fewer frames than it holds: 20 (offsets: see the AVI 1.0 specification)."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, 20)
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, 20)
    path.write_bytes(data)


def _mislabel(path: Path) -> None:
    """Give a Matroska file a title in GBK and a duration that is none."""
    with av.open(str(path)) as source, av.open(str(path.with_suffix(".part")), "w", format="matroska") as target:
        target.metadata["title"] = "TITLE"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    data = path.with_suffix(".part").read_bytes()
    path.with_suffix(".part").unlink()
    assert b"00:00:0" in data
    path.write_bytes(data.replace(b"TITLE", b"\xc4\xe3\xba\xc3\xff").replace(b"00:00:0", b"soon:00"))


_FAST = {"preset": "veryfast", "crf": "16", "threads": "1"}
_H265 = {"preset": "ultrafast", "crf": "16", "x265-params": "log-level=none:pools=1:frame-threads=1:keyint=24"}
_VP9 = {"crf": "20", "b": "0", "deadline": "realtime", "cpu-used": "8", "g": "24", "threads": "1"}

SOUND = (
    Clip("h264.mp4", options={**_FAST, "g": "24"}),
    Clip("h264_one_keyframe.mp4", frames=60, options={**_FAST, "g": "250"}),
    Clip("h264_faststart.mov", fps=30, options={**_FAST, "g": "12"}),
    Clip("h264.mkv", options={**_FAST, "g": "24"}),
    Clip("h264.ts", options={**_FAST, "g": "24"}),
    Clip("h265.mp4", codec="libx265", options=_H265),
    Clip("h265_10bit.mp4", codec="libx265", pixels="yuv420p10le", options=_H265),
    Clip("vp9.webm", codec="libvpx-vp9", options=_VP9),
    Clip("vp9_odd.webm", codec="libvpx-vp9", height=97, width=131, options=_VP9),
    Clip("h264_odd.mp4", height=95, width=129, pixels="yuv444p", options={**_FAST, "g": "24"}),
    Clip("av1.mp4", codec="libsvtav1", options={"preset": "10", "crf": "10", "g": "24"}),
    Clip("variable.mp4", fps=20, ticks=(1, 3, 2, 2), options={**_FAST, "g": "12"}),
    Clip("rotated_90.mp4", height=128, width=96, rotation=90, options={**_FAST, "g": "24"}),
    Clip("rotated_180.mp4", rotation=180, options={**_FAST, "g": "24"}),
    Clip("rotated_270.mp4", height=128, width=96, rotation=-90, options={**_FAST, "g": "24"}),
    Clip("anamorphic.mp4", width=128, sample_aspect=Fraction(4, 3), options={**_FAST, "g": "24"}),
    Clip("audio.mp4", audio=True, options={**_FAST, "g": "24"}),
    Clip("ntsc.mp4", fps=30000 / 1001, options={**_FAST, "g": "24"}),
    Clip("raw.h264", fps=25, options={**_FAST, "g": "24"}),
    Clip("title.mkv", options={**_FAST, "g": "24"}, after=_mislabel),
    Clip("lying.avi", codec="mpeg4", options={"g": "12", "qscale": "2", "b:v": "2M"}, after=_lie_in_avi),
)
"""Files of which every frame decodes."""


@dataclass(frozen=True)
class Video:
    """One sound file of the corpus: how it was made, where it lies, a caption of what it shows."""

    clip: Clip
    path: Path
    caption: str


class Corpus:
    """The files, rendered into ``folder`` when they are first asked for.

    Attributes:
        folder: of all files.
        videos: the sound ones, by name.
        damaged: the others: name and path.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.videos = {clip.name: Video(clip, write(clip, folder / clip.name), _scene()[1]) for clip in SOUND}
        self.damaged = {path.name: path for path in _write_damaged(folder)}

    def path(self, name: str) -> Path:
        """Where the file of that name lies."""
        return self.damaged[name] if name in self.damaged else self.videos[name].path


def write(clip: Clip, path: Path) -> Path:
    """Render ``clip`` to a file; returns its path."""
    pictures = picture(clip)
    options = {"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}
    rate = Fraction(clip.fps).limit_denominator(1001)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(clip.codec, rate=rate, options=dict(clip.options))
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], clip.pixels
        stream.codec_context.time_base = 1 / (2 * rate) if clip.ticks != (2,) else 1 / rate
        stream.codec_context.sample_aspect_ratio = clip.sample_aspect
        sound = container.add_stream("aac", rate=16000, layout="mono") if clip.audio else None
        for image, start in zip(pictures, clip.tick_starts, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format=clip.pixels)
            frame.time_base = stream.codec_context.time_base
            frame.pts = start if clip.ticks != (2,) else start // 2
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _hum(container, sound, clip.frames / clip.fps)
    if clip.rotation:
        _tag_rotation(path, clip.rotation)
    if clip.after is not None:
        clip.after(path)
    return path


def picture(clip: Clip) -> np.ndarray:
    """What is stored for ``clip``, uint8 [T, H, W, 3]: numbered frames, turned and squeezed as a player undoes it."""
    frames = numbered(clip.frames, clip.height, clip.width)
    columns = ((np.arange(round(clip.width / clip.sample_aspect)) + 0.5) * float(clip.sample_aspect)).astype(int)
    frames = frames[:, :, columns]
    return np.rot90(frames, -clip.rotation // 90, axes=(1, 2))


def numbered(frames: int, height: int, width: int) -> np.ndarray:
    """A scene of the shapes world with each frame's number in its middle, uint8 [T, H, W, 3]."""
    clip = _drawn(frames, height, width).copy()
    top, left, rise, step = _place(height, width)
    for number, frame in enumerate(clip):
        for bit in range(BITS):
            block = frame[top : top + rise, left + bit * step : left + (bit + 1) * step]
            block[:] = 235 if number >> bit & 1 else 16
    return clip


def frame_number(frame: np.ndarray) -> int:
    """The number drawn into a displayed frame, uint8 [H, W, 3], of any size with the same shorter side in view."""
    top, left, rise, step = _place(*frame.shape[:2])
    middle = frame[top + rise // 3 : top + rise - rise // 3].astype(float).mean(axis=(0, 2))
    return sum(int(middle[left + bit * step + step // 2] > 128) << bit for bit in range(BITS))


def _place(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height of the row of blocks, and width of one: the row is half of the shorter side."""
    side = min(height, width)
    step = side // (2 * BITS)
    return height // 2 - side // 12, width // 2 - BITS * step // 2, side // 6, step


@cache
def _scene() -> tuple[Scene, str]:
    rng = np.random.default_rng(5)
    scene = sample_scene(rng, World.full(), None)
    return scene, caption(scene, rng)


@cache
def _drawn(frames: int, height: int, width: int) -> np.ndarray:
    return render([_scene()[0]], frames, height, width)[0].numpy()


def _hum(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    """Encode a tone of 220 Hz."""
    wave = np.sin(2 * np.pi * 220 * np.arange(int(16000 * seconds)) / 16000)
    for start in range(0, len(wave), 1024):
        samples = (wave[start : start + 1024] * 8000).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _tag_rotation(path: Path, degrees: int) -> None:
    """Write a display matrix into the track header of an mp4 (ISO/IEC 14496-12, 8.3.2): 3 x 3, 16.16 and 2.30."""
    data = bytearray(path.read_bytes())
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), -90: (0, -1)}[degrees]
    matrix = [cosine << 16, -sine << 16, 0, sine << 16, cosine << 16, 0, 0, 0, 1 << 30]
    struct.pack_into(">9i", data, data.index(b"tkhd") + 4 + 40, *matrix)
    path.write_bytes(data)


def _write_damaged(folder: Path) -> list[Path]:
    """Files that are not what their names promise."""
    whole = (folder / "h264.mp4").read_bytes()
    middle = bytearray(whole)
    start = whole.index(b"mdat") + (len(whole) - whole.index(b"mdat")) // 2
    middle[start : start + len(whole) // 4] = bytes(len(whole) // 4)
    index_last = io.BytesIO()
    with av.open(str(folder / "h264.mp4")) as source, av.open(index_last, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(folder / "only_audio.mp4"), "w") as container:
        _hum(container, container.add_stream("aac", rate=16000, layout="mono"), 1.0)
    contents = {
        "truncated.mp4": whole[: len(whole) * 6 // 10],
        "truncated_index.mp4": index_last.getvalue()[: len(index_last.getvalue()) * 6 // 10],
        "truncated.mkv": (folder / "h264.mkv").read_bytes()[: (folder / "h264.mkv").stat().st_size * 6 // 10],
        "zero_bytes.mp4": b"",
        "text.mp4": b"this is no video\n" * 50,
        "holes.mp4": bytes(middle),
        "mp4_inside.webm": whole,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in (*contents, "only_audio.mp4")]
