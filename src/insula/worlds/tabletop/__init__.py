"""Simulated environments: `import insula.worlds.tabletop`, then `gymnasium.make("insula/Tabletop-v0")`.

Importing this is cheap; MuJoCo and OpenGL load with the first environment and the first image.
"""

from gymnasium.envs.registration import register, registry

TABLETOP = "insula/Tabletop-v0"
MAX_EPISODE_STEPS = 100  # 10 s; the expert takes 27 with the noise of demonstrations (docs/log.md)

# A module that is reloaded would register the id again, of which Gymnasium warns.
if TABLETOP not in registry:
    register(
        id=TABLETOP, entry_point="insula.worlds.tabletop.environment:TabletopEnv", max_episode_steps=MAX_EPISODE_STEPS
    )
