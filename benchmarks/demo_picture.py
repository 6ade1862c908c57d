"""The README's moving picture: what the embedded model draws, each video above its prompt.

    python benchmarks/demo_picture.py        # writes docs/media/demo.gif; a minute or two on two cores

Every video is what ``ospnext generate --prompt PROMPT seed=SEED`` makes; docs/results.md says how often prompts like
these come out right.
"""

import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ospnext import OSPNextPipeline
from ospnext.device import resolve_device

TARGET = Path(__file__).parent.parent / "docs" / "media" / "demo.gif"
VIDEOS = {  # prompt: seed
    "A large red star circles clockwise on a beige background.": 1,
    "A large yellow crescent moves to the right on a dark blue background.": 2,
    "A big pink ring grows on a black background.": 3,
    "A large green triangle bounces up and down on a white background.": 4,
    "A large orange cross moves to the left on a grey background.": 5,
    "A big cyan circle shrinks steadily on a brown background.": 7,
    "A large purple star floats upwards on a white background.": 8,
    "A large orange triangle moves to the right on a grey background.": 15,
}
COLUMNS, SIDE, GAP, TEXT = 4, 160, 14, 56  # TEXT is the height of a prompt; all but COLUMNS in pixels
FRAME_MS, LAST_MS = 60, 600  # GIF counts in hundredths of a second: 60 is nearest to 16 frames a second
COLOURS = 128


def make_videos(prompts: dict[str, int], batch_size: int = 4) -> np.ndarray:
    """A video of each prompt from its seed, uint8 [B, T, H, W, 3], with the model's own settings."""
    pipe = OSPNextPipeline.from_pretrained("shapes", torch_dtype=torch.float32, device=resolve_device("auto"))
    videos = []
    for i in range(0, len(prompts), batch_size):
        some = dict(list(prompts.items())[i : i + batch_size])
        noise = [torch.Generator().manual_seed(seed) for seed in some.values()]
        videos.append(pipe(list(some), generator=noise).frames)
    return (np.concatenate(videos) * 255).round().astype(np.uint8)


def draw_page(prompts: list[str]) -> Image.Image:
    """The page without the videos: every prompt below the place of its video."""
    rows = -(-len(prompts) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + TEXT + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, prompt in enumerate(prompts):
        x, y = place(i)
        draw.multiline_text((x, y + SIDE + 4), "\n".join(textwrap.wrap(prompt, 24)), "#404040", font, spacing=3)
    return page


def place(i: int) -> tuple[int, int]:
    """The upper left corner of video ``i``."""
    return GAP + i % COLUMNS * (SIDE + GAP), GAP + i // COLUMNS * (SIDE + TEXT + GAP)


def main() -> None:
    """Write docs/media/demo.gif."""
    videos = make_videos(VIDEOS)
    page = draw_page(list(VIDEOS))
    frames = []
    for moment in videos.swapaxes(0, 1):
        frame = page.copy()
        for i, picture in enumerate(moment):
            frame.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS), place(i))
        frames.append(frame)
    # One palette for all, or colours would flicker; chosen for cover, or small things would lose theirs to backgrounds.
    some = np.concatenate([np.asarray(frame) for frame in frames[::8]])
    palette = Image.fromarray(some).quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=1)
    flat = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * (len(flat) - 1) + [LAST_MS]
    flat[0].save(TARGET, save_all=True, append_images=flat[1:], duration=durations, loop=0)
    print(f"wrote {TARGET}: {TARGET.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
