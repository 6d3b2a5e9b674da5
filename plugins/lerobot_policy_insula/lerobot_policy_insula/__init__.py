"""A LeRobot policy that asks a policy server (`insula serve`): `--policy.type=insula --policy.url=ws://host:8000`.

LeRobot finds this package by its name, the three modules by theirs.
"""

from lerobot_policy_insula.configuration_insula import InsulaConfig
from lerobot_policy_insula.modeling_insula import InsulaPolicy
from lerobot_policy_insula.processor_insula import make_insula_pre_post_processors

__all__ = ["InsulaConfig", "InsulaPolicy", "make_insula_pre_post_processors"]
