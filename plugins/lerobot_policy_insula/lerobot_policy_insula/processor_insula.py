"""LeRobot's own steps but for normalization, which is the server's."""

from typing import Any

from lerobot.processor import AddBatchDimensionProcessorStep, DeviceProcessorStep, RenameObservationsProcessorStep
from lerobot.processor.factory import make_policy_processor_pipelines

from lerobot_policy_insula.configuration_insula import InsulaConfig


def make_insula_pre_post_processors(config: InsulaConfig, dataset_stats: dict | None = None) -> tuple[Any, Any]:
    """(before the policy, after it)."""
    return make_policy_processor_pipelines(
        input_steps=[
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            DeviceProcessorStep(device=config.device),
        ],
        output_steps=[DeviceProcessorStep(device="cpu")],
    )
