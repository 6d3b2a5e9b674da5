"""A thin client in the shape of a LeRobot policy: it has no weights."""

import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from insula.client.connection import KEY_VARIABLE, Client
from insula.errors import InputError
from lerobot_policy_insula.configuration_insula import InsulaConfig

IMAGES, STATE = "observation.images.", "observation.state"


class InsulaPolicy(PreTrainedPolicy):
    """Connects at the first observation. Raises insula's ServerError where no server answers, ProtocolError where it
    refuses an observation, KeyError naming a camera that the batch lacks; never answers in the server's place."""

    config_class = InsulaConfig
    name = "insula"

    def __init__(self, config: InsulaConfig, **_: Any) -> None:
        super().__init__(config)
        self.client = Client(config.url, os.environ.get(KEY_VARIABLE), config.timeout_s, config.certificate)
        self._due: deque[Tensor] = deque()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> "InsulaPolicy":
        """From a directory with a config.json: there are no weights to read."""
        policy = cls(config or PreTrainedConfig.from_pretrained(pretrained_name_or_path, **kwargs))
        policy.eval()
        return policy

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        self.config._save_pretrained(Path(save_directory))

    def reset(self) -> None:
        """Forget what was not executed, and let the server forget: it knows a subtask as long as a connection."""
        self._due.clear()
        self.client.close()

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """The next action [B, D]; asks for a chunk where none is left."""
        if not self._due:
            chunk = self.predict_action_chunk(batch)
            self._due.extend(chunk.unbind(1)[: self.config.n_action_steps])
        return self._due.popleft()

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """A chunk [B, H, D], one request for each row. Raises InputError for several rows where the server would take
        them for one robot's."""
        tasks = batch.get("task", "")
        rows = len(batch[STATE])
        if rows > 1 and self.client.metadata.get("mode") == "subtask":
            raise InputError(f"{rows} robots over one connection, but the server remembers one subtask for each; use 1")
        tasks = [tasks] * rows if isinstance(tasks, str) else list(tasks)
        chunks = [self.client.infer(self._observation(batch, row, tasks[row])).actions for row in range(rows)]
        return torch.from_numpy(np.stack(chunks)).float().to(self.config.device)

    def _observation(self, batch: dict[str, Tensor], row: int, task: str) -> dict[str, Any]:
        images = {}
        for name in self.client.metadata["cameras"]:
            picture = batch[IMAGES + self.config.cameras.get(name, name)][row]
            # LeRobot's pictures are floats [3, h, w] of whole gray levels / 255: this is exact.
            images[name] = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()

        return {"images": images, "state": batch[STATE][row].cpu().numpy(), "task": task}

    def get_optim_params(self) -> dict:
        """Raises NotImplementedError."""
        raise NotImplementedError("an insula policy is trained by `insula train`")

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict | None]:
        """Raises NotImplementedError."""
        raise NotImplementedError("an insula policy is trained by `insula train`")
