"""The command: which files it takes, what it says, and what it says of bad input."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from ospnext.cli import main
from ospnext.prepare.plan import PlanConfig, make_plan
from ospnext.prepare.plan_devices import devices
from ospnext.prepare.plan_report import settings_of, verdict
from ospnext.prepare.plan_time import step_flops, step_sent

ROOT = Path(__file__).parents[2]
GENERATE, TRAIN = ROOT / "tests/data/seed_generate.yaml", ROOT / "tests/data/seed_train.yaml"


def plan(path: Path, *overrides: str, **keys):
    return make_plan(PlanConfig(config=str(path), overrides=overrides, **keys))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((f"configs/generate/{name}.yaml", "generate") for name in ("osp_14b", "osp_hif8_1_3b", "shapes")),
        ("configs/shapes/transformer.yaml", "train"),
        ("configs/train/osp_14b_from_wan.yaml", "train"),
        *((f"tests/data/seed_{name}.yaml", "generate") for name in ("generate", "generate_merged", "generate_paths")),
        *((f"tests/data/seed_{name}.yaml", "train") for name in ("train", "train_dataset")),
    ],
)
def test_every_recipe_can_be_planned_without_weights(name: str, kind: str) -> None:
    made = plan(ROOT / name, world=2)
    assert made.recipe.kind == kind
    assert made.least.peak > 0
    if kind == "generate":
        assert all(a.run.total <= b.run.total * 1.001 for a, b in pairwise(made.options))


def test_sharded_state_is_the_state_over_the_ranks() -> None:
    whole, shared = (plan(TRAIN, f"fsdp_size={n}", world=8).chosen.phases[-1].parts for n in (1, 8))
    weights = 4 * 14_288_491_584
    assert whole["master weights"] == whole["gradients"] == whole["EMA"] == whole["optimiser"] // 2 == weights
    assert shared["master weights"] == pytest.approx(weights / 8, rel=1e-3)


def test_an_adapter_has_the_state_and_the_weights_are_frozen() -> None:
    given = ("fsdp_size=1", "lora_config.rank=32")
    whole, adapter = (plan(TRAIN, *words, world=8).chosen for words in (given[:1], given))
    state = adapter.phases[-1].parts
    numbers = 40 * 8 * 32 * 2 * 5120
    assert state["frozen weights"] == 2 * 14_288_491_584
    assert state["master weights"] == state["gradients"] == state["EMA"] == state["optimiser"] // 2 == 4 * numbers
    assert adapter.peak < 0.4 * whole.peak
    assert adapter.step.linears < 0.8 * whole.step.linears
    with pytest.raises(ValueError, match="no linear of this model is called to_q"):
        plan(TRAIN, "lora_config.target_modules=[to_q]", world=8)


def test_a_teacher_takes_its_weights_and_a_dense_forward_pass() -> None:
    words = ("fsdp_size=8", "skiparse_sp_size=4", "use_skiparse_sequence_parallel=true")
    alone, taught = (plan(TRAIN, *words, f"distillation_config.weight={w}", world=8) for w in (0, 0.5))
    flops = step_flops(taught.recipe, taught.chosen.mesh)
    dense = plan(
        TRAIN, *words, "model_config.skiparse_model_type=full", "use_skiparse_sequence_parallel=false", world=8
    )
    forward = step_flops(dense.recipe, dense.chosen.mesh)["dense blocks"]
    assert sum(flops["teacher"]) < sum(forward)  # of four processes here, of one there
    assert sum(flops["teacher"]) == pytest.approx(sum(forward) / 4, rel=0.02)
    own, more = alone.chosen.step, taught.chosen.step
    assert more.attention > 1.3 * own.attention
    assert more.linears == pytest.approx(own.linears * 5 / 4, rel=0.02)  # checkpointed: two forward, two backward
    assert more.exchanges > own.exchanges
    assert step_sent(taught.recipe, taught.chosen.mesh).gathers > step_sent(alone.recipe, alone.chosen.mesh).gathers
    assert taught.chosen.phases[-1].parts["teacher"] == pytest.approx(2 * 14_288_491_584 / 8, rel=1e-3)


def test_checkpointing_and_sharing_a_video_save_activations() -> None:
    def activations(*overrides: str) -> int:
        return plan(TRAIN, *overrides, world=8).chosen.phases[0].parts["activations"]

    assert activations("gradient_checkpointing=false") > 5 * activations()
    whole = activations("use_skiparse_sequence_parallel=false")
    assert activations() == pytest.approx(whole / 4, rel=0.2)


def test_the_best_mesh_comes_first_and_what_does_not_fit_is_said() -> None:
    made = plan(TRAIN, world=8, accelerator="a100")
    best = min(o.step.total / o.mesh.dp for o in made.options)
    assert made.options[0].step.total / made.options[0].mesh.dp == pytest.approx(best, abs=1e-4)
    assert all(o.peak <= made.device.memory for o in made.options)
    tight = plan(TRAIN, "gradient_checkpointing=false", "use_skiparse_sequence_parallel=false", world=8)
    assert tight.chosen.peak > tight.device.memory
    assert "does not fit" in verdict(tight)
    none = plan(TRAIN, "gradient_checkpointing=false", world=1)
    assert not none.options
    assert "nothing fits" in verdict(none)
    assert settings_of(none.least) in verdict(none)
    odd = plan(GENERATE, world=6)
    assert "cannot be used" in verdict(odd)


def test_guidance_apart_halves_the_step() -> None:
    made = plan(GENERATE, world=8)
    steps = {o.mesh: o.step.total for o in made.options}
    for mesh, seconds in steps.items():
        other = mesh._replace(cfg=2, dp=mesh.dp // 2)
        if mesh.cfg == 1 and other in steps:
            assert steps[other] == pytest.approx(seconds / 2, rel=0.05)


def test_settings_are_of_the_run_that_is_planned() -> None:
    made = plan(GENERATE, "num_frames=17", "scheduler_config.num_inference_steps=10", world=4, kind="generate")
    assert made.recipe.grid.t == 5
    assert made.recipe.steps == 10


def test_every_rate_has_a_source() -> None:
    for device in devices().values():
        for rate in device.rates.values():
            assert rate.value > 0
            assert rate.kind in ("measured", "datasheet", "estimated")
            assert rate.source


def test_the_command_prints_tables_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(GENERATE), "--world", "8", "num_frames=17"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for text in (
        "memory of one rank",
        "PFLOP of one rank",
        "time of one rank",
        "sent by one rank",
        "best first",
        "chosen",
        "fits",
    ):
        assert text in shown
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["world"] == 8
    assert said["chosen"]["fits"]
    assert said["fitting"][0]["run_seconds"] <= said["fitting"][-1]["run_seconds"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "config is missing"),
        (["none.yaml"], "No such file"),
        ([str(GENERATE), "num_framse=17"], "unknown key 'num_framse'; did you mean 'num_frames'"),
        ([str(GENERATE), "world=1000000000000"], "less than or equal to 100000"),
        ([str(GENERATE), "accelerator=h1000"], "use one of h100"),
        ([str(GENERATE), "world=0"], "world"),
        ([str(GENERATE), "optimizer_config.lr=1"], "say for=train or for=generate"),
        ([str(TRAIN), "data_config.dataset_config.sample_num_frames=80"], "4k + 1 frames"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], message: str, capsys) -> None:
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
