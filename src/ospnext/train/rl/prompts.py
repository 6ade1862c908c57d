"""Prompts of reinforcement learning: a text file, JSON lines with metadata, or scenes of the shapes world.

prompts.txt            a prompt a line
prompts.jsonl          {"prompt": "...", ...} a line; what else it holds is metadata for rewards
shapes:large           scenes of that world; shapes:large:512 for so many
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ospnext.config import ConfigError
from ospnext.generate.settings import read_prompt_file
from ospnext.shapes.captions import caption
from ospnext.shapes.world import World, sample_scene

WORLDS = ("large", "simple", "full")
SCENES = {False: 4096, True: 64}  # of a world for training, and for evaluation, where nobody says how many


class Prompt(NamedTuple):
    """A prompt, and what rewards are told of it."""

    text: str
    metadata: dict[str, Any]


def read_prompts(path: str, seed: int, held_out: bool = False) -> list[Prompt]:
    """All prompts of a file, or of a world.

    Args:
        path: as above.
        seed: of scenes and their wording.
        held_out: of a world: scenes that training never shows.

    Raises:
        ConfigError: there are none, or the file is of another kind.
        FileNotFoundError: it is not there.
    """
    if path.startswith("shapes:"):
        return _draw_scenes(path, seed, held_out)
    if Path(path).suffix != ".jsonl":
        return [Prompt(text, {}) for text in read_prompt_file(path)]
    prompts = []
    for number, line in enumerate(read_prompt_file(path), start=1):
        try:
            values = json.loads(line)
            text = values.pop("prompt").strip()
            if not text:
                raise ValueError("blank")
            prompts.append(Prompt(text, values))
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f'{path}, line {number}: not {{"prompt": "...", ...}}: {line[:80]}') from error
    return prompts


def _draw_scenes(name: str, seed: int, held_out: bool) -> list[Prompt]:
    _, world, *more = name.split(":")
    if world not in WORLDS or len(more) > 1 or (more and not (more[0].isdecimal() and int(more[0]))):
        raise ConfigError(f"{name!r} is no world: write shapes:{'|'.join(WORLDS)}, and :NUMBER for so many scenes")
    rng = np.random.default_rng(seed)
    count = int(more[0]) if more else SCENES[held_out]
    scenes = [sample_scene(rng, getattr(World, world)(), held_out=held_out) for _ in range(count)]
    return [Prompt(caption(scene, rng), {"scene": scene.to_dict()}) for scene in scenes]


def groups_of_epoch(epoch: int, groups: int, prompts: int, seed: int) -> list[int]:
    """Which prompts an epoch takes, one for each group: all of a file in a random order before any comes again.

    A function of its arguments: there is no state, and a resumed run goes on where it was.
    """
    chosen: list[int] = []
    place = epoch * groups
    while len(chosen) < groups:
        round_, start = divmod(place + len(chosen), prompts)
        order = np.random.default_rng([seed, round_]).permutation(prompts)
        chosen += order[start : start + groups - len(chosen)].tolist()
    return chosen


def share_of(rank: int, ranks: int, groups: int, size: int) -> list[int]:
    """The samples of a rank, of ``groups * size`` in all; sample s is number s % size of group s // size.

    Whole groups go round the ranks where that comes out even, else the largest equal parts of groups do.
    """
    total = groups * size
    assert total % ranks == 0
    part = next(n for n in range(size, 0, -1) if size % n == 0 and (total // n) % ranks == 0)
    return [s for s in range(total) if s // part % ranks == rank]
