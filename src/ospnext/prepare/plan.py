"""``ospnext plan CONFIG``: memory, traffic and time of a run before it starts, on any number of devices.

    ospnext plan configs/generate/osp_14b.yaml world=8
    ospnext plan my_training.yaml world=64 accelerator=h200 gradient_checkpointing=true

Needs no weights, no accelerator and no time: the networks are made on the meta device. Keys that are not its own change
the configuration that is planned.
"""

import json
from typing import Literal

from pydantic import Field

from ospnext.config import Config, ConfigError
from ospnext.prepare.plan_devices import find_device
from ospnext.prepare.plan_mesh import all_meshes, configured_mesh
from ospnext.prepare.plan_options import Plan, order, try_mesh
from ospnext.prepare.plan_recipe import make_recipe, read_config
from ospnext.prepare.plan_report import as_json, print_plan
from ospnext.sections import RunConfig


class PlanConfig(Config):
    """``ospnext plan``: what a run of another command will need."""

    config: str = Field(min_length=1, description="the YAML file of a generate or train run")
    overrides: tuple[str, ...] = Field(
        (), description="key=value settings of that run; on the command line as they are"
    )
    kind: Literal["generate", "train"] | None = Field(
        None, alias="for", description="the command the file is for; default: told by its keys"
    )
    world: int | None = Field(
        None,
        ge=1,
        le=10**5,
        strict=False,
        description="devices; default: fsdp_size times ddp_size where the file says, else 1",
    )
    accelerator: str = Field("h100", description="h100 | h200 | a100 | rtx4090 | ascend910b")
    videos: int = Field(1, ge=1, strict=False, description="videos of a generate run: what its meshes are sorted for")
    as_json: bool = Field(False, alias="json", description="print JSON")


def run(config: PlanConfig) -> str | None:
    """Plan as configured; prints tables, or returns JSON.

    Raises:
        ValueError: the configuration to plan cannot be used.
        FileNotFoundError: there is no such file.
    """
    plan = make_plan(config)
    if config.as_json:
        return json.dumps(as_json(plan), indent=2)
    print_plan(plan)
    return None


def make_plan(config: PlanConfig) -> Plan:
    """All that ``run`` prints.

    Raises:
        ValueError, FileNotFoundError: as ``run``.
    """
    device = find_device(config.accelerator)
    wanted = read_config(config.config, config.overrides, config.kind)
    recipe = make_recipe(wanted, device)
    world = config.world or _world(wanted)
    chosen, refusal = None, ""
    try:
        chosen = try_mesh(recipe, configured_mesh(recipe, wanted, world), device, config.videos)
    except ConfigError as error:
        refusal = str(error)
    options = [try_mesh(recipe, mesh, device, config.videos) for mesh in all_meshes(recipe, world)]
    fitting = sorted((o for o in options if o.peak <= device.memory), key=lambda o: order(recipe, o))
    least = min(options, key=lambda o: o.peak)
    notices = wanted.notices
    return Plan(recipe, device, world, config.videos, chosen, refusal, tuple(fitting), len(options), least, notices)


def _world(config: RunConfig) -> int:
    return config.fsdp_size * (config.ddp_size or 1) if "fsdp_size" in config.model_fields_set else 1
