"""Looking at one sample: everything that is known of it, and what is wrong."""

import dataclasses
from typing import Literal

import jax
import numpy as np

from insula.certificate import SUFFIX, Outcome, Proof, Prover, make_prover
from insula.data.samples import Samples
from insula.inspection.influence import Forward, Influence, forward, influence
from insula.inspection.measure import Measure, SampleMeasures, measurer
from insula.inspection.subject import Sample, Subject
from insula.inspection.token_columns import TokenColumns, columns, is_question
from insula.inspection.variants import Variant, variants
from insula.model.config import ModelConfig


class Inspector:
    """Looks at one sample after another with programs compiled once."""

    def __init__(self, subject: Subject, seed: int = 0):
        self.subject, self.seed = subject, seed
        config = subject.assets.config
        self._prove: Prover = make_prover(config, tuple(SUFFIX))
        self._measure: Measure = measurer(config)
        self._forward: Forward = forward(config)

    def look(self, number: int, source: str | None = None) -> "Findings":
        """Everything about one sample. Raises ValueError or IndexError for a sample that does not exist."""
        sample = self.subject.sample(number, source)
        batch, config, assets = sample.batch, self.subject.assets.config, self.subject.assets
        seen = columns(batch, config, assets.tokenizer, is_question(sample.source))
        found = Findings(self.subject, sample, seen, self.seed)
        found.drawn = variants(config, seen.token_mask, seen.ar_mask, found.expert_positions)
        if self.subject.params is None:
            return found
        rng, params = jax.random.key(self.seed), self.subject.params
        found.proof = self._prove(params, batch, rng)
        found.influence = influence(self._forward, params, config, batch, seen, rng)
        found.measured = jax.device_get(self._measure(params, batch, _real(sample, config), rng))
        return found


@dataclasses.dataclass
class Findings:
    """What is known of one sample. `drawn`: the masks, the model's own first. Without the model's parameters the last
    three are None."""

    subject: Subject
    sample: Sample
    seen: TokenColumns
    seed: int
    drawn: list[Variant] = dataclasses.field(default_factory=list)
    proof: Proof | None = None
    influence: Influence | None = None
    measured: SampleMeasures | None = None

    @property
    def has_actions(self) -> bool:
        return bool(self.sample.batch.action_mask.any())

    @property
    def has_answer(self) -> bool:
        return bool(self.seen.loss_mask.any())

    @property
    def expert_positions(self) -> int:
        """Of the action expert, in the mask: none where there is nothing for it to do."""
        config = self.subject.assets.config
        return config.horizon + (config.state_input == "token") if self.has_actions else 0

    @property
    def shows_insulation(self) -> bool:
        """Only a sample with both losses can."""
        return self.has_actions and self.has_answer

    @property
    def outcome(self) -> Outcome | Literal["not asked"]:
        """The worse of both measurements; "not asked" where nothing is wrong, but the sample lacks a loss."""
        proofs = [self.influence, self.proof if self.shows_insulation else None]
        outcomes: list[Outcome] = ["leaks"] if self.drawn[0].unlike() else []
        outcomes += [proof.outcome for proof in proofs if proof and proof.outcome != "holds"]
        return outcomes[0] if outcomes else "holds" if all(proofs) else "not asked"

    @property
    def faults(self) -> list[str]:
        """What contradicts insulation, or keeps this from showing it."""
        cells = self.drawn[0].unlike()
        found = [f"attention: {len(cells)} cells are not as they must be, first {cells[0]}"] if cells else []
        found += list(self.influence.findings) if self.influence else []
        return found + (list(self.proof.findings) if self.proof and self.shows_insulation else [])


def _real(sample: Sample, config: ModelConfig) -> np.ndarray:
    """Which values of a chunk [H, D] its robot has."""
    real = np.zeros((config.horizon, config.action_dim), bool)
    if isinstance(sample.source, Samples):
        real[: sample.source.robot.horizon, : sample.source.robot.action_dim] = True
    return real
