"""Where the server is, and how much of a chunk is executed."""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig


@PreTrainedConfig.register_subclass("insula")
@dataclass
class InsulaConfig(PreTrainedConfig):
    """The API key is the environment's INSULA_API_KEY: a config is saved, shown and uploaded, a key must not be."""

    url: str = "ws://127.0.0.1:8000"
    certificate: str | None = None
    """File of certificates to trust, for wss://."""
    timeout_s: float = 10.0
    n_action_steps: int | None = None
    """Actions executed of each chunk; all of it unless given."""
    cameras: dict[str, str] = field(default_factory=dict)
    """LeRobot's name of each of the policy's cameras, where it is another: {"front": "top"}."""

    @property
    def observation_delta_indices(self) -> None:
        """It looks at the present only."""

    @property
    def action_delta_indices(self) -> None:
        """Nothing is trained here, so no future actions are read."""

    @property
    def reward_delta_indices(self) -> None:
        """Nor rewards."""

    def get_optimizer_preset(self) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError("an insula policy is trained by `insula train`")

    def get_scheduler_preset(self) -> None:
        """None."""

    def validate_features(self) -> None:
        """What fits is the server's to say, at the first observation."""
