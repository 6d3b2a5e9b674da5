"""Looking at one sample: everything that is known of it, and what is wrong."""

import dataclasses

import jax
import numpy as np

from insula.batch import LossName
from insula.certificate.gradients import Prover, make_prover
from insula.certificate.proof import VERDICTS, Outcome, Proof
from insula.certificate.table import Scheme, table_columns
from insula.data.samples import Samples
from insula.inspection.influence import Forward, Influence, make_forward, measure_influence
from insula.inspection.measure import Measure, SampleMeasures, make_measure
from insula.inspection.speech import Listener, Speech, teaches_backbone
from insula.inspection.subject import Sample, Subject
from insula.inspection.token_columns import TokenColumns, form_of, lay_out_columns
from insula.inspection.variants import MaskVariant, draw_variants
from insula.model.config import ModelConfig


class Inspector:
    """Looks at one sample after another with programs compiled once. `seed`: of noise and flow time."""

    def __init__(self, subject: Subject, seed: int = 0):
        self.subject = subject
        self.seed = seed

        # All four schemes: what the two beside the proof let through is what a reader learns most from. Nothing
        # compiles before its first call, so a model that is not run costs nothing here.
        config = subject.assets.config
        self._prove: Prover = make_prover(config, tuple(Scheme))
        self._measure: Measure = make_measure(config)
        self._forward: Forward = make_forward(config)
        self._listener = Listener(subject.assets)

    def look(self, number: int, source: str | None = None) -> "Findings":
        """Everything about one sample, of the source `Subject.first` unless named, and beside it the other sequences of
        its frame. Raises InputError where there is none."""
        sample, config = self.subject.sample(number, source), self.subject.assets.config
        found = self._lay_out(sample)
        found.others = [self._lay_out(other) for other in self.subject.beside(sample)]

        # Tokens and masks need no weights.
        if self.subject.params is None:
            return found

        # One key for all three: they show the same noise, and the same sample looked at again shows the same page.
        rng, params = jax.random.key(self.seed), self.subject.params
        found.proof = self._prove(params, sample.batch, rng)
        found.influence = measure_influence(self._forward, params, config, sample.batch, found.seen, rng)

        for one in found.sequences:
            has_value = _has_value(one.sample, config)
            one.measured = jax.device_get(self._measure(params, one.sample.batch, has_value, rng))

            # Random weights would say random tokens.
            if self.subject.trained and teaches_backbone(one.sample):
                one.speech = self._listener.hear(params, one.sample)

        return found

    def _lay_out(self, sample: Sample) -> "Findings":
        """What is known of a sample without weights."""
        config, tokenizer = self.subject.assets.config, self.subject.assets.tokenizer
        seen = lay_out_columns(sample.batch, config, tokenizer, form_of(sample.source))
        found = Findings(self.subject, sample, seen, self.seed)
        found.drawn = draw_variants(config, seen.token_mask, seen.ar_mask, found.expert_positions)
        return found


@dataclasses.dataclass
class Findings:
    """What is known of one sample. `drawn`: the masks, the model's own first. Without the model's parameters what was
    measured is None, and `speech` also where there is nothing to hear.

    `others`: the other sequences of its frame, of which no gradient and no influence is measured.
    """

    subject: Subject
    sample: Sample
    seen: TokenColumns
    seed: int
    drawn: list[MaskVariant] = dataclasses.field(default_factory=list)
    proof: Proof | None = None
    influence: Influence | None = None
    measured: SampleMeasures | None = None
    speech: Speech | None = None
    others: list["Findings"] = dataclasses.field(default_factory=list)

    @property
    def sequences(self) -> list["Findings"]:
        """All sequences of the frame, the one that was asked for first."""
        return [self, *self.others]

    @property
    def has_actions(self) -> bool:
        """Whether the flow loss scores anything here."""
        return bool(self.sample.batch.action_mask.any())

    @property
    def has_answer(self) -> bool:
        """Whether the token loss scores anything here."""
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
    def columns(self) -> list[tuple[LossName, Scheme]]:
        """Of the gradient table, those that say something: a loss that the sample lacks has zeros everywhere."""
        there = {LossName.FLOW: self.has_actions, LossName.FAST: self.has_answer}
        return [(loss, scheme) for loss, scheme in table_columns(self.proof.table) if there[loss]] if self.proof else []

    @property
    def outcome(self) -> Outcome:
        """The worse of both measurements; NOT_ASKED where nothing is wrong, but the sample lacks a loss."""
        # The model's own mask before anything measured: what it opens leaks, with these weights or with others.
        if any(one.drawn[0].faults() for one in self.sequences):
            return Outcome.LEAKS

        # What a sample lacks is zero for want of a loss, which is no fault: without both losses gradients do not count.
        proofs = [self.influence, self.proof if self.shows_insulation else None]
        for proof in proofs:
            if proof and proof.outcome is not Outcome.HOLDS:
                return proof.outcome

        return Outcome.HOLDS if all(proofs) else Outcome.NOT_ASKED

    @property
    def verdict(self) -> str:
        """The outcome as a sentence."""
        return "The model was not run." if self.proof is None and not self.faults else VERDICTS[self.outcome]

    @property
    def faults(self) -> list[str]:
        """What contradicts insulation, or keeps this from showing it."""
        found = []
        for one in self.sequences:
            if cells := one.drawn[0].faults():
                where = f" of {one.sample.name}" if self.others else ""
                found.append(f"attention{where}: {len(cells)} cells are not as they must be, first {cells[0]}")

        found += self.influence.findings if self.influence else ()
        found += self.proof.findings if self.proof and self.shows_insulation else ()

        return found


def _has_value(sample: Sample, config: ModelConfig) -> np.ndarray:
    """Which values of a chunk [H, D] its robot has: padded steps of this sample too, for the policy acts on them."""
    # The model's sizes are those of the largest robot; the rest of a smaller one's chunk goes straight to 0.
    has_value = np.zeros((config.horizon, config.action_dim), bool)
    if isinstance(sample.source, Samples):
        robot = sample.source.robot
        has_value[: robot.horizon, : robot.action_dim] = True

    return has_value
