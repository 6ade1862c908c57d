"""The configuration base and its loader: strict, frozen, one line for every mistake."""

import random
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from ospnext.config import (
    Config,
    ConfigError,
    Fate,
    KeyRule,
    config_keys,
    dump_yaml,
    load_config,
    nearest_key,
    parse_override,
    read_yaml,
    refuse_placeholders,
    save_config,
)
from ospnext.device import resolve_dtype
from ospnext.generate.settings import WAN_SAMPLING, GenerateConfig, SamplerConfig, read_prompts
from ospnext.ops.attention import available_kernels
from ospnext.sections import AttentionKernel, DType, ModelConfig, RunConfig
from ospnext.train.settings import TrainConfig


class Inner(Config):
    """A section."""

    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    words: tuple[str, ...] = ()
    named: dict[str, str] = Field(default={})


class Outer(Config):
    """A configuration."""

    name: str = "x"
    mode: Literal["auto", "on", "off"] = "auto"
    limit: int | None = Field(default=None, ge=1)
    inner: Inner = Inner()


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_then_overrides_then_defaults(tmp_path):
    path = write(tmp_path, "name: file\ninner:\n  rate: 2\n  sizes: [3, 4]\n")
    config = load_config(Outer, path, ["inner.rate=1e-4", "limit=7", ("mode", "off")])
    assert config == Outer(name="file", mode="off", limit=7, inner=Inner(rate=1e-4, sizes=(3, 4)))


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "inner:\n"])
def test_empty_files_and_sections_mean_defaults(tmp_path, text):
    assert load_config(Outer, write(tmp_path, text)) == Outer()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=1e-4", 1e-4),
        ("a=-2.5", -2.5),
        ("a=true", True),
        ("a=False", False),
        ("a=null", None),
        ("a=", None),
        ("a=off", "off"),
        ("a=yes", "yes"),
        ("a=1:30", "1:30"),
        ("a=a cat: it runs # fast, [really]", "a cat: it runs # fast, [really]"),
        ("a='12'", "12"),
        ("a=[1, 2]", [1, 2]),
        ("a=b=c", "b=c"),
        ("a=2024-01-01", "2024-01-01"),
        ("a=010", 10),
        ("a=-089", -89),
        ("a=0x10", "0x10"),
        ("a=1_000", "1_000"),
    ],
)
def test_overrides_are_yaml_scalars_of_few_surprises(text, value):
    key, found = parse_override(text)
    assert key == "a"
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", "a=[1", "a=" + "[" * 5000, "a=" + "1" * 5000])
def test_bad_overrides(text):
    with pytest.raises(ConfigError):
        parse_override(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nmae=1", "unknown key 'nmae'; did you mean 'name'?"),
        ("rate=1", "did you mean 'inner.rate'?"),
        ("inenr.rate=1", "did you mean 'inner.rate'?"),
        ("inner.size=1", "did you mean 'inner.sizes'?"),
        ("zebra=1", "unknown key 'zebra'"),
        ("inner=3", "'inner' is a section, but holds 3"),
        ("limit=0", "limit is 0, but should be greater than or equal to 1"),
        ("limit=a", "limit is 'a', but should be a valid integer"),
        ("limit=1.0", "limit is 1.0, but should be a valid integer"),
        ("limit=true", "limit is True, but should be a valid integer"),
        (f"limit={10**400}", "0..., but whole numbers go up to 9223372036854775807"),
        (f"limit=-{10**400}", "0..., but whole numbers go up to 9223372036854775807"),
        ("inner.sizes=[1, 2, b]", "inner.sizes[2] is 'b', but should be a valid integer"),
        ("name=3", "name is 3, but should be a valid string (in quotes)"),
        ("mode=maybe", "mode is 'maybe', but should be 'auto', 'on' or 'off'"),
        ("name.first=a", "name"),
    ],
)
def test_mistakes_are_named_in_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, None, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_suggested_where_nothing_is_near():
    assert nearest_key("zebra", ["name", "inner.rate"]) is None
    assert nearest_key("vae.dtype", ["text_encoder_config.dtype", "vae_config.dtype"]) == "vae_config.dtype"


def test_many_mistakes_stay_one_readable_line():
    with pytest.raises(ConfigError, match="and 15 more"):
        load_config(Outer, None, [f"wrong{i}=1" for i in range(20)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list"),
        ("just words\n", "holds a str"),
        ("a: [1\n", "not valid YAML"),
        ("name: a\nname: b\n", "key 'name' stands twice"),
        ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("[" * 5000, r"config\.yaml: not valid YAML: lists or mappings stand too deep"),
        ("{a: " * 5000, r"config\.yaml: not valid YAML: lists or mappings stand too deep"),
        ("inner: &a {inner: *a}\n", r"config\.yaml: not valid YAML: found unconstructable recursive node"),
        ("name: &a [*a]\n", r"config\.yaml: not valid YAML: found unconstructable recursive node"),
        ("name: !!int x\n", r"config\.yaml: not valid YAML: 'x' is no whole number"),
        ("name: !!bool x\n", r"config\.yaml: not valid YAML: a value is not of the type"),
    ],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_yaml(write(tmp_path, text))


def test_binary_and_missing_files(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="not a text file"):
        read_yaml(path)
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml")


def test_sections_are_frozen_all_through():
    config = Outer(inner=Inner(sizes=[5]))
    assert config.inner.sizes == (5,)
    with pytest.raises(ValidationError):
        config.name = "y"


@pytest.mark.parametrize("cls", [GenerateConfig, TrainConfig])
def test_saved_configs_read_back_equal(tmp_path, cls):
    text_len = ["text_encoder_config.text_len=77", "model_config.patch_size=[1, 2, 2]"]
    config = load_config(cls, None, ["seed=7", "model_config.dim=64", *text_len])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(cls, tmp_path / "saved.yaml") == config
    assert "model_config:" in dump_yaml(config)


WORDS = r"""
0 1 89 0089 1e5 1234e56 1_000 +1 0x1f 0o7 1:30 2024-01-01 .inf -.INF .nan yes No on true TRUE null ~ é 日 😀 a
+ - . e _ : # , [ ] { } & * ! | > % @ ` ' " = << --- ... \
"""
BLANKS = ["", " ", "\t", "\n", "\r", ": ", " #", "- ", "? ", "word ", "\0", "\x7f", "\x85", "\xa0", "\u2028", "\ufeff"]


def test_every_text_reads_back(tmp_path):
    rng, parts = random.Random(0), WORDS.split() + BLANKS
    texts = ["".join(rng.choices(parts, k=rng.choice((2, 2, 3, 5, 60)))) for _ in range(1000)]
    for text in parts + texts:
        config = Outer(name=text, inner=Inner(words=(text, "", text), named={text: text}))
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(Outer, tmp_path / "saved.yaml") == config, repr(text)


def test_rules_settle_what_the_class_does_not_know():
    rules = {
        "old": KeyRule(Fate.RENAMED, target="name"),
        "idle": KeyRule(Fate.NO_EFFECT, why="nobody needs it"),
        "extra.rate": KeyRule(Fate.MAPPED, target="inner.rate"),
    }
    config = load_config(Outer, None, ["idle=3", "extra.rate=0.25"], rules)
    assert config.inner.rate == 0.25
    assert config.notices == ("idle has no effect here: nobody needs it",)
    with pytest.raises(ConfigError, match="key 'old' is not read: use name"):
        load_config(Outer, None, ["old=3"], rules)
    assert load_config(Outer, None, ["extra.rate=0.25", "inner.rate=0.25"], rules).inner.rate == 0.25
    with pytest.raises(ConfigError, match=r"'extra.rate' is 0.25, but 'inner.rate', which means the same, is 0.5"):
        load_config(Outer, None, ["extra.rate=0.25", "inner.rate=0.5"], rules)


def test_placeholders_are_named_with_their_keys():
    refuse_placeholders(Outer(name="/path/tools"))
    with pytest.raises(ConfigError, match=r"name \(/path/to/weights\)"):
        refuse_placeholders(Outer(name="/path/to/weights"))


def test_names_of_numbers_and_kernels_are_those_the_code_knows():
    for name in DType.__args__:
        assert resolve_dtype(name).is_floating_point
    assert set(AttentionKernel.__args__) == {"auto", *available_kernels()}


def test_one_process_shrinks_parallel_sizes_and_says_so():
    config = RunConfig(fsdp_size=8, sp_size=4, use_sequence_parallel=True, explicit_prefetching_num_blocks=2).alone()
    assert (config.fsdp_size, config.ddp_size, config.sp_size, config.skiparse_sp_size) == (1, 1, 1, 1)
    assert config.cfg_parallel_size == 1
    assert not config.use_sequence_parallel
    assert config.notices == (
        "one process: fsdp_size 8, sp_size 4 become 1",
        "explicit_prefetching_num_blocks has no effect here: the model is whole in one process, nothing is sharded",
    )
    assert RunConfig().alone().notices == ()


@pytest.mark.parametrize(
    ("settings", "world_size", "shards"), [({}, 16, 8), ({}, 12, 6), ({}, 3, 3), ({"fsdp_size": 8}, 12, 8)]
)
def test_shards_that_nobody_chose_fit(settings, world_size, shards):
    assert RunConfig(**settings).shards(world_size) == shards


def test_sizes_count_where_they_are_asked_for():
    assert RunConfig(sp_size=3, skiparse_sp_size=4).sequence == (1, 1)
    assert RunConfig(sp_size=3, skiparse_sp_size=4, use_skiparse_sequence_parallel=True).sequence == (4, 1)
    assert RunConfig(sp_size=3, use_sequence_parallel=True).sequence == (1, 3)


def test_architecture_holds_what_was_given():
    assert RunConfig().architecture() == {}
    config = load_config(RunConfig, None, ["model_config.dim=64", "text_encoder_config.text_len=77"])
    assert config.architecture() == {"dim": 64, "text_len": 77}
    assert RunConfig(model_name="wan_t2v").architecture() == {"skiparse_model_type": "full"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model_config.patch_size=[1, 2, 0]", "patch_size[2] is 0"),
        ("model_config.patch_size=[-1, 2, 2]", "patch_size[0] is -1"),
        ("model_config.freq_dim=15", "freq_dim is 15, but should be a multiple of 2"),
        ("model_config.dim=1000000000000", "model_config.dim is 1000000000000"),
        ("model_config.num_layers=1000000", "model_config.num_layers is 1000000"),
        ("lora_config.rank=1000000", "lora_config.rank is 1000000"),
        ("optimizer_config.betas=[1.5, 0.9]", "optimizer_config.betas[0] is 1.5, but should be less than 1"),
        ("optimizer_config.lr=1e300", "optimizer_config.lr is 1e+300"),
        ("optimizer_config.eps=1e-300", "optimizer_config.eps is 1e-300"),
        ("scheduler_config.base_shift=1000", "scheduler_config.base_shift is 1000"),
        ("scheduler_config.max_shift=-1000", "scheduler_config.max_shift is -1000"),
        ("validation_config.save_fps=1e300", "validation_config.save_fps is 1e+300"),
        ("validation_config.num_videos=10000000", "validation_config.num_videos is 10000000"),
        (f"training_iteration={10**400}", "training_iteration is 1000"),
        (f"warmup_steps={10**400}", "warmup_steps is 1000"),
    ],
)
def test_values_that_nothing_can_be_done_with_are_refused(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, None, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model_config.text_len=512", "text_encoder_config.text_len=226"], "text_len is 512"),
        (["model_name=wan_t2v", "model_config.skiparse_model_type=dual_end"], "wan_t2v is dense"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, None, overrides)


def test_sampling_values_come_from_the_config_then_the_model_then_wan():
    config = GenerateConfig(height=64, scheduler_config=SamplerConfig(shift=3.0))
    assert config.sampling() == WAN_SAMPLING._replace(height=64, shift=3.0)
    model = {"height": 128, "width": 128, "num_frames": 33, "shift": 1.0, "negative_prompt": "", "sampler": "unipc"}
    assert config.sampling(model) == (33, 64, 128, 50, 5.0, 3.0, "unipc")


def test_weights_that_say_nothing_sample_as_users_of_wan_expect():
    assert GenerateConfig().sampling() == (81, 480, 832, 50, 5.0, 5.0, "euler")
    described = dict(config_keys(GenerateConfig))
    assert (described["scheduler_config.shift"].description or "").endswith("(Wan: 5.0)")


def test_the_embedded_model_is_used_when_no_other_is_named():
    assert GenerateConfig().embedded
    assert GenerateConfig(model="shapes").embedded
    assert not GenerateConfig(model="folder").embedded
    weights = ModelConfig(pretrained_model_dir_or_checkpoint="weights.pt")
    assert not GenerateConfig(transformer_config=weights).embedded
    with pytest.raises(ValidationError, match="both name weights"):
        GenerateConfig(model="folder", transformer_config=weights)


def test_a_prompt_on_the_command_line_replaces_the_files(tmp_path):
    path = write(tmp_path, "prompt_txt: list.txt\nseed: 3\n")
    config = load_config(GenerateConfig, path, ["prompt=a cat"])
    assert (config.prompt, config.prompt_txt, config.seed) == ("a cat", None, 3)
    with pytest.raises(ConfigError, match="prompt and prompt_txt are both given"):
        load_config(GenerateConfig, path, ["prompt=a cat", "prompt_txt=other.txt"])


def test_prompts(tmp_path):
    path = tmp_path / "list"
    path.write_text("\n  first \n\n\nsecond\n", encoding="utf-8")
    assert read_prompts(GenerateConfig(prompt_txt=str(path))) == ["first", "second"]
    assert read_prompts(GenerateConfig(prompts=str(path))) == ["first", "second"]
    assert read_prompts(GenerateConfig(prompt_txt="a cat runs")) == ["a cat runs"]
    assert read_prompts(GenerateConfig(prompt_txt="word " * 400)) == ["word " * 400]
    assert read_prompts(GenerateConfig(prompt=["a", "b"])) == ["a", "b"]


@pytest.mark.parametrize(
    "settings", [{}, {"prompt": " "}, {"prompt": []}, {"prompt": ["a", ""]}, {"prompt_txt": ""}, {"prompts": "."}]
)
def test_no_prompt_is_an_error(settings):
    with pytest.raises(ConfigError):
        read_prompts(GenerateConfig(**settings))


def test_prompt_files_that_cannot_be_used(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(ConfigError, match=r"empty\.txt holds no prompt"):
        read_prompts(GenerateConfig(prompt_txt=str(empty)))
    empty.write_bytes(b"\xff\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_prompts(GenerateConfig(prompt_txt=str(empty)))
    for source in ("prompt_txt", "prompts"):
        with pytest.raises(FileNotFoundError):
            read_prompts(GenerateConfig(**{source: str(tmp_path / "none.txt")}))
