"""Dense weights become sparse: other layouts for the same weights, and a frozen teacher beside the student."""

from pathlib import Path

import pytest
import torch
from saved_states import read_state
from test_sft import read_log, train, words

from ospnext.checkpoints.components import EMBEDDED
from ospnext.config import load_config
from ospnext.flow.path import TIMESTEPS
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops.layout import Layout
from ospnext.parallel.launch import Launch
from ospnext.train.distil import Teacher, build_teacher, check_teacher
from ospnext.train.job import settle
from ospnext.train.networks import arrange, build
from ospnext.train.noise import add_noise
from ospnext.train.settings import NoiseConfig, TrainConfig
from ospnext.train.sft import velocity_loss

SIZES = {"dim": 16, "ffn_dim": 32, "freq_dim": 8, "text_dim": 12, "text_len": 3, "in_dim": 4, "out_dim": 4}
SPARSE = {"model_config__skiparse_model_type": "uniform", "convert_layouts": True, "train_text_encoder": False}


@pytest.fixture
def dense(tmp_path: Path, vae_folder: Path) -> Path:
    """A pipeline folder of a dense model that was trained a little."""
    assert train(tmp_path / "dense", vae_folder, model_config__skiparse_model_type="full") == 0
    return tmp_path / "dense/pipeline"


def random_model(seed: int, kind: str) -> OSPNextTransformer3DModel:
    torch.manual_seed(seed)
    model = OSPNextTransformer3DModel(**SIZES, num_heads=2, num_layers=4, skiparse_model_type=kind)
    torch.nn.init.normal_(model.head.head.weight, std=0.3)
    return model.double()


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_gradient_is_that_of_the_two_distances(weight: float) -> None:
    student, frozen = random_model(0, "uniform"), random_model(1, "full").requires_grad_(False)
    noisy = add_noise(torch.randn(3, 4, 2, 10, 12), [4, 5, 6], NoiseConfig(shift=2.0))
    text = torch.randn(3, 3, 12)
    losses = velocity_loss(student, noisy, text, Teacher(frozen, weight))
    losses["loss"].backward()
    found = [p.grad.clone() for p in student.parameters()]

    student.zero_grad()
    x_t, velocity, sigma = noisy
    ours = student(x_t, TIMESTEPS * sigma, text, return_dict=False)[0]
    theirs = frozen(x_t, TIMESTEPS * sigma, text, return_dict=False)[0]
    by_hand = 2 / ours.numel() * ((1 - weight) * (ours - velocity) + weight * (ours - theirs))
    ours.backward(by_hand.detach())
    for p, gradient in zip(student.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, p.grad, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in frozen.parameters())
    expected = (1 - weight) * losses["loss_flow"] + weight * losses["loss_distillation"]
    torch.testing.assert_close(losses["loss"], expected)


def test_the_student_is_the_dense_model_in_other_layouts(tmp_path: Path, dense: Path, vae_folder: Path) -> None:
    given = words(tmp_path / "run", None, model=dense, distillation_config__weight=0.5, **SPARSE)
    config = load_config(TrainConfig, None, given)
    job = settle(config, Launch())
    check_teacher(config, job)
    crew = arrange(config, job)
    student, teacher = build(config, job, crew).transformer, build_teacher(config, job, crew)
    assert teacher is not None
    assert set(student.layouts) == {Layout.TOKEN, Layout.GROUP}
    assert set(teacher.transformer.layouts) == {Layout.FULL}
    pairs = zip(student.parameters(), teacher.transformer.parameters(), strict=True)
    assert all(torch.equal(p, q) and p.requires_grad and not q.requires_grad for p, q in pairs)


def test_a_run_from_dense_to_sparse_and_back(tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture) -> None:
    assert train(tmp_path / "run", None, model=dense, distillation_config__weight=0.5, **SPARSE) == 0
    assert "a frozen teacher with 4 of 4 blocks dense gives 50% of the loss" in capsys.readouterr().out
    for line in read_log(tmp_path / "run"):
        assert line["loss"] == pytest.approx((line["loss_flow"] + line["loss_distillation"]) / 2, abs=2e-6)
    names = read_state(tmp_path / "run/iter_000000005", "")
    trained = {name.partition(".")[2] for name in names if name != "optimiser.steps"}
    with torch.device("meta"):
        pipe = OSPNextPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert trained == {f"transformer.{name}" for name, _ in pipe.transformer.named_parameters()}
    assert pipe.transformer.config.skiparse_model_type == "uniform"
    back = SPARSE | {"model_config__skiparse_model_type": "full", "training_iteration": 1}
    assert train(tmp_path / "back", None, model=tmp_path / "run/pipeline", **back) == 0


def test_learning_only_from_a_teacher_that_one_equals_leaves_nothing_to_learn(tmp_path: Path, dense: Path) -> None:
    same = {"model": dense, "distillation_config__weight": 1.0, "training_iteration": 1}
    same |= SPARSE | {"model_config__skiparse_model_type": "full"}
    assert train(tmp_path / "run", None, **same) == 0
    (line,) = read_log(tmp_path / "run")
    assert line["loss"] == line["loss_distillation"] < 1e-10 < line["loss_flow"]


def test_an_interrupted_run_with_a_teacher_goes_on_exactly(tmp_path: Path, dense: Path) -> None:
    settings = SPARSE | {"model": dense, "distillation_config__weight": 0.5}
    assert train(tmp_path / "whole", None, **settings) == 0
    assert train(tmp_path / "parts", None, **settings, training_iteration=2) == 0
    assert train(tmp_path / "parts", None, **settings) == 0
    one, other = (read_state(tmp_path / run / "iter_000000005", "") for run in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"convert_layouts": False}, "skiparse_model_type is 'full' there but 'uniform' was asked for"),
        ({"train_text_encoder": True}, "train_text_encoder must be off"),
        ({"distillation_config__weight": 0, "distillation_config__teacher": "x"}, "give a weight up to 1"),
        ({"distillation_config__weight": 1.5}, "distillation_config.weight"),
        ({"distillation_config__teacher": "nowhere"}, "nowhere"),
        ({"distillation_config__teacher": "shapes"}, "model_config.in_dim is 4, but the teacher's in"),
    ],
)
def test_what_cannot_be_is_said_first(
    tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture, settings: dict, said: str
) -> None:
    given = SPARSE | {"model": dense, "distillation_config__weight": 0.5} | settings
    assert train(tmp_path / "run", None, **given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_random_weights_are_no_teacher(tmp_path: Path, vae_folder: Path, capsys: pytest.CaptureFixture) -> None:
    given = {"distillation_config__weight": 0.5, "model_config__text_dim": 128, "train_text_encoder": False}
    assert train(tmp_path / "run", vae_folder, **given, text_encoder_config__checkpoint_path=EMBEDDED) == 2
    assert "training starts from random weights" in capsys.readouterr().err
