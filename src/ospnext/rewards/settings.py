"""The configuration section of rewards, for whoever runs them."""

from typing import Any

from pydantic import Field

from ospnext.config import Config


class RewardConfig(Config):
    """What rewards are made of, beside their weights."""

    options: dict[str, dict[str, Any]] = Field(
        default={}, description="options by the reward's name, such as {videoalign: {load_from_pretrained: FOLDER}}"
    )
    device: str | None = Field(
        default=None, description="where rewards compute, such as cuda:1; default: as the run itself"
    )
    separate: tuple[str, ...] = Field(default=(), description="rewards that get a process of their own")
