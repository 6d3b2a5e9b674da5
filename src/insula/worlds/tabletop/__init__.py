"""Simulated environments: `make_tabletop("put")`, or `gymnasium.make("insula/Tabletop-v0")`.

Importing this is cheap; MuJoCo and OpenGL load with the first environment and the first image.
"""

import gymnasium
from gymnasium.envs.registration import register, registry

TABLETOP = "insula/Tabletop-v0"
MAX_EPISODE_STEPS = 100  # 10 s; the expert takes 27 with the noise of demonstrations (docs/log.md)

# A module that is reloaded would register the id again, of which Gymnasium warns.
if TABLETOP not in registry:
    register(
        id=TABLETOP, entry_point="insula.worlds.tabletop.environment:TabletopEnv", max_episode_steps=MAX_EPISODE_STEPS
    )


def make_tabletop(task: str = "put", image_size: int = 64) -> gymnasium.Env:
    """An environment of this task, with the task's own step limit. Raises InputError for an unknown task and for an
    image size that is not from 16 to 1024."""
    from insula.worlds.tabletop.tasks import find_task  # it loads MuJoCo

    steps = find_task(task).max_steps
    return gymnasium.make(TABLETOP, max_episode_steps=steps, task=task, image_size=image_size, disable_env_checker=True)
