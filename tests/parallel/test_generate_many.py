"""``ospnext generate`` on many processes: the videos of one process, whatever the mesh and the number of prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate_cases as cases
import pytest
import torch
from processes import Processes

from ospnext.checkpoints.lora import linear_shapes
from ospnext.checkpoints.lora_files import Adapter, Pair, write_adapter
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.media import read_video

Group = Callable[[int], Processes]

PROMPTS = ("a large red star", "two blue squares on a white background", "a small green circle")
SSP2 = ("use_skiparse_sequence_parallel=true", "skiparse_sp_size=2")
SSP4 = ("use_skiparse_sequence_parallel=true", "skiparse_sp_size=4")
ULYSSES2 = ("use_sequence_parallel=true", "sp_size=2")
CFG2 = ("cfg_parallel_size=2",)
TILES = ("vae_tiling=on",)
OVERLAPPED = ("overlap_exchanges=true",)


@pytest.fixture(scope="module")
def expected() -> Callable[[tuple[str, ...]], dict[str, torch.Tensor]]:
    """What one process makes of the prompts, in tiles or not; made once."""
    made: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}

    def of(words: tuple[str, ...]) -> dict[str, torch.Tensor]:
        if words not in made:
            made[words] = cases.frames(0, 1, words, PROMPTS[:2])
        return made[words]

    return of


@pytest.mark.parametrize(
    ("world", "mesh"),
    [
        (2, (*SSP2, "fsdp_size=2", "explicit_prefetching_num_blocks=2", *OVERLAPPED)),
        (2, (*ULYSSES2, "fsdp_size=1")),
        (2, (*CFG2, "fsdp_size=2", "reshard_after_forward=false", *TILES)),
        (4, (*CFG2, *SSP2, "fsdp_size=4")),
        (4, (*SSP2, *ULYSSES2, "fsdp_size=2", "model_cpu_offload=true", *OVERLAPPED)),
        (4, (*SSP4, "guidance_mode=sequential", *TILES)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_latents_and_frames_are_those_of_one_process(
    world: int, mesh: tuple[str, ...], processes: Group, expected: Any
) -> None:
    first, *others = processes(world).run(cases.frames, world, mesh, PROMPTS[:2])
    one = expected(TILES if "vae_tiling=on" in mesh else ())
    assert first.keys() == one.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, one[name], atol=2e-4, rtol=2e-4)
    for other in others:
        assert "frames" not in other, "the first process of a video has it"
        assert torch.equal(other["latents"], first["latents"])


@pytest.mark.parametrize(
    ("world", "mesh"),
    [
        (2, (*SSP2, "fsdp_size=2")),
        pytest.param(4, (*CFG2, *ULYSSES2, "fsdp_size=1"), marks=pytest.mark.long),
    ],
)
def test_in_8_bits_too(world: int, mesh: tuple[str, ...], processes: Group, expected: Any) -> None:
    """As far from plain numbers as one process's HiF8 is; not closer to that than to them, see docs/hif8.md."""
    hif8 = ("model_config.quant=hif8", "model_config.quant_attn=hif8")
    plain, one = expected(())["latents"], expected(hif8)["latents"]
    found = processes(world).run(cases.frames, world, (*mesh, *hif8), PROMPTS[:2])
    first, *others = (result["latents"] for result in found)
    assert 0.5 < (first - plain).norm() / (one - plain).norm() < 2
    assert (one - plain).norm() < 0.4 * plain.norm()  # latents of another seed: 1.4
    assert all(other.equal(first) for other in others)


def test_with_loras_too(processes: Group, expected: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = linear_shapes(OSPNextPipeline.from_pretrained("shapes").transformer)
    words = []
    for number, target in enumerate(("self_attn.q", "ffn.2")):
        named = [name for name in shapes if name.endswith(target)]
        pairs = {}
        for name in named:
            down, up = ((3, shapes[name][1]), (shapes[name][0], 3))
            pairs[name] = Pair(*(0.1 * torch.randn(size, generator=generator) for size in (down, up)), 6.0)
        words.append(str(write_adapter(Adapter(pairs), tmp_path / str(number))))
    given = (f"lora_path=[{','.join(words)}]", "lora_scale=[0.5,1]")
    one = cases.frames(0, 1, given, PROMPTS[:2])["latents"]
    plain = expected(())["latents"]
    assert (one - plain).norm() > 0.01 * plain.norm()
    for mesh in ((*SSP2, "fsdp_size=2"), (*ULYSSES2, "fsdp_size=1")):
        for found in processes(2).run(cases.frames, 2, (*given, *mesh), PROMPTS[:2]):
            torch.testing.assert_close(found["latents"], one, atol=2e-4, rtol=2e-4)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("world", "mesh", "prompts"),
    [
        (2, ("fsdp_size=2", "batch_size=2"), 3),  # the last of two groups has nothing in the second round
        (2, ("fsdp_size=2",), 1),  # nor has it in the first
        (2, ("fsdp_size=1",), 3),
        (4, (*SSP2, "batch_size=2", "fsdp_size=4"), 3),
    ],
    ids=str,
)
def test_any_number_of_prompts(
    world: int, mesh: tuple[str, ...], prompts: int, processes: Group, tmp_path: Path
) -> None:
    values = {"prompt": PROMPTS[:prompts], "output_dir": str(tmp_path / "many")}
    line, *silent = processes(world).run(cases.make, world, mesh, values)
    assert f"{prompts} new" in line
    assert silent == [None] * (world - 1)
    cases.make(0, 1, (), values | {"output_dir": str(tmp_path / "one")})
    many, one = manifest(tmp_path / "many"), manifest(tmp_path / "one")
    names = [f"video_{i}.mp4" for i in range(prompts)]
    assert sorted(path.name for path in (tmp_path / "many").glob("video_*.mp4")) == sorted([*names, "video_grid.mp4"])
    for made, expected in zip(many["videos"], one["videos"], strict=True):
        assert {k: v for k, v in made.items() if k != "seconds"} == {
            k: v for k, v in expected.items() if k != "seconds"
        }
    for name in names:
        ours, theirs = (read_video(tmp_path / folder / name).frames for folder in ("many", "one"))
        assert abs(ours.astype(float) - theirs).mean() < 2, "a rounded pixel makes the codec choose otherwise"
    assert many["settings"] == one["settings"]
    assert many["report"]["parallel"].startswith(f"{world} processes: ")


def test_what_the_keys_of_sharding_say_is_done(processes: Group) -> None:
    words = (
        "fsdp_size=2",
        "reshard_after_forward=false",
        "explicit_prefetching_num_blocks=3",
        "model_cpu_offload=true",
    )
    for sharding, notes in processes(2).run(cases.sharding, 2, words, PROMPTS[:1]):
        assert (sharding.reshard_after_forward, sharding.explicit_prefetching_num_blocks) == (False, 3)
        assert notes == "model_cpu_offload has no effect: the model runs on the CPU already"


def test_a_run_goes_on_where_another_stopped(processes: Group, tmp_path: Path) -> None:
    """What one process has begun, two finish, and the other way round."""
    values = {"output_dir": str(tmp_path), "prompt": PROMPTS}
    cases.make(0, 1, (), values | {"prompt": PROMPTS[:1]})
    (tmp_path / "video_grid.mp4").unlink()
    before = (tmp_path / "video_0.mp4").stat().st_mtime_ns
    line, _ = processes(2).run(cases.make, 2, ("fsdp_size=2",), values)
    assert "3 videos (2 new" in line
    assert (tmp_path / "video_0.mp4").stat().st_mtime_ns == before
    assert "3 videos (0 new" in str(cases.make(0, 1, (), values))
    (tmp_path / "video_1.mp4").unlink()
    assert "3 videos (1 new" in processes(2).run(cases.make, 2, SSP2, values)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sp_size=3", "use_sequence_parallel=true"), "ssp 1 x ulysses 3 .* What fits: .*ssp 2 with ulysses 1"),
        (("skiparse_sp_size=8", "use_skiparse_sequence_parallel=true"), "does not fit 2 processes"),
        (("cfg_parallel_size=2", "scheduler_config.guidance_scale=1"), "guidance is off .* cfg_parallel_size=1"),
        ((*CFG2, *SSP2), "with cfg_parallel_size 2 .* What fits: ssp 1 with ulysses 1"),
        (("fsdp_size=2", "ddp_size=2"), "fsdp_size 2 x ddp_size 2 does not fit 2 processes. What fits.* 1 x 2, 2 x 1"),
        (("model=nowhere",), "nowhere does not exist"),
        ((*SSP2, *OVERLAPPED, "model_config.quant=hif8"), "overlap_exchanges is true, but .* 8 bits.*leave it out"),
        (("scheduler_config.guidance_scale=1e38",), "came out as NaN or infinite"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_by_all(
    words: tuple[str, ...], message: str, processes: Group, tmp_path: Path
) -> None:
    said = processes(2).run(cases.make, 2, words, {"prompt": PROMPTS, "output_dir": str(tmp_path / "out")})
    assert said[0] == said[1]
    assert said[0].startswith("RefusalError: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(said[0])
    assert not list(tmp_path.glob("out/*.mp4"))


@pytest.mark.long
@pytest.mark.parametrize("cfg", [1, 2])
@pytest.mark.parametrize(("ssp", "ulysses"), [(4, 1), (2, 2), (1, 4), (4, 2), (2, 1), (1, 8)])
def test_eight_processes(cfg: int, ssp: int, ulysses: int, processes: Group, expected: Any, tmp_path: Path) -> None:
    fsdp = 8 if (ssp.bit_length() + cfg) % 2 else 1  # half of the meshes whole, half in shards, of either guidance
    words = [f"cfg_parallel_size={cfg}", f"skiparse_sp_size={ssp}", f"sp_size={ulysses}", f"fsdp_size={fsdp}"]
    mesh = (*words, "use_sequence_parallel=true", "use_skiparse_sequence_parallel=true")
    values = {"prompt": PROMPTS, "output_dir": str(tmp_path)}
    if cfg * ssp * ulysses > 8:
        assert "does not fit" in processes(8).run(cases.make, 8, mesh, values)[0]
        return
    first = processes(8).run(cases.frames, 8, mesh, PROMPTS[:2])[0]
    for name, value in first.items():
        torch.testing.assert_close(value, expected(())[name], atol=2e-4, rtol=2e-4)
    assert "3 videos (3 new" in processes(8).run(cases.make, 8, mesh, values)[0]
