"""What is learned, and which gradient goes where: as settings. `insula.losses` does what they say."""

import dataclasses
from typing import Literal

from insula.checks import check_choice, check_integer, check_number
from insula.errors import InputError

Mistake = Literal["none", "stop_at_embeddings", "visible_fast"]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned, and which gradient goes where (`insula.losses`). Raises InputError for contradictions."""

    knowledge_insulation: bool = True
    """The flow loss stops at the backbone's keys and values."""
    flow_gradient_scale: float = 1.0
    """Without insulation: γ, the share of the flow loss's gradient that passes there, 0 to 1. 1 is joint training."""
    flow_gradient_end: float | None = None
    """γ at the last update, which it reaches evenly from `flow_gradient_scale` on. None: it stays."""
    ki_fast_loss_weight: float = 1.0
    """λ in total = flow + λ · fast. With insulation it scales the backbone's gradient and never the expert's."""
    freeze_backbone: bool = False
    """Train the expert alone, vision and backbone as they are."""
    flow_samples: int = 1
    """Noise draws per sample that share one backbone pass, K; each costs only the expert."""
    rtc_max_delay: int = 0
    """Training-time real-time chunking (arXiv 2512.05964): a chunk's first d steps are given, not learned, with d drawn
    from 0 to this many for each noise draw. At a robot these are the steps that are executed while the chunk is
    computed. 0: off."""
    mistake: Mistake = "none"
    """One that public implementations make, made here to be measured (insula.model.mistakes): the gradient stopped at
    the embeddings while every layer keeps it, or FAST tokens that the expert can read."""

    @property
    def gamma(self) -> float:
        """γ, what of the flow loss's gradient passes: 0 with insulation. At the first update, where it changes."""
        return 0.0 if self.knowledge_insulation else self.flow_gradient_scale

    @property
    def flow_reaches_backbone(self) -> bool:
        """Whether the flow loss trains the backbone as well, at some time: neither insulated nor frozen."""
        passes = self.gamma > 0 or (self.flow_gradient_end or 0) > 0
        return passes and not self.freeze_backbone

    def __post_init__(self) -> None:
        weight = self.ki_fast_loss_weight
        check_number("objective: ki_fast_loss_weight", weight, "≥ 0", lambda value: value >= 0)

        # With none the flow loss would be a mean over nothing, and the expert would silently never learn.
        check_integer("objective: flow_samples", self.flow_samples, 1)
        check_integer("objective: rtc_max_delay", self.rtc_max_delay, 0)
        check_choice("objective: mistake", self.mistake, ("none", "stop_at_embeddings", "visible_fast"))

        for name in ("flow_gradient_scale", "flow_gradient_end"):
            if (share := getattr(self, name)) is not None:
                check_number(f"objective: {name}", share, "from 0 to 1", lambda value: 0 <= value <= 1)
        if self.knowledge_insulation and (self.flow_gradient_scale != 1 or self.flow_gradient_end is not None):
            raise InputError(
                f"objective: flow_gradient_scale is {self.flow_gradient_scale} and flow_gradient_end is "
                f"{self.flow_gradient_end}, but knowledge_insulation lets none of that gradient pass; set "
                "knowledge_insulation=False"
            )
        if self.mistake == "stop_at_embeddings" and not self.flow_reaches_backbone:
            raise InputError(
                "objective: mistake 'stop_at_embeddings' lets the layers keep the gradient, which knowledge_insulation "
                "or freeze_backbone takes from them; set both to False"
            )

        # Insulated from the flow loss and without a token loss, the backbone would silently never change.
        if weight == 0 and not self.flow_reaches_backbone and not self.freeze_backbone:
            raise InputError(
                "objective: knowledge_insulation with ki_fast_loss_weight = 0 leaves the backbone without any "
                "gradient; set a weight > 0, or freeze_backbone=True if that is what you want"
            )


INSULATED = ObjectiveConfig()
