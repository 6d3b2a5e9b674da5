"""What the backbone says when a sample's own prompt asks it, the likeliest token each time: a subtask, an answer, or an
action in FAST tokens.

    prompt ─► one token after another ─► prompt and what was said, in the one pass of training ─► probabilities

The second pass is there for what else might have stood in each place: while a policy speaks, nobody looks at that.
"""

import dataclasses
from functools import partial

import jax
import numpy as np

from insula.batch import Batch, LossName, Observation
from insula.compile import compiled_quickly
from insula.data.robot import Robot
from insula.data.samples import Samples
from insula.decode.tokens import Generated, bucket, check_limit, generate
from insula.errors import InputError
from insula.inspection.measure import TokenScores, as_served, make_score
from insula.inspection.subject import Sample
from insula.model.params import Params
from insula.runs.assets import Assets
from insula.shapes import Array
from insula.tokens.dialects import Form
from insula.tokens.fast import Decoded
from insula.tokens.fast_grammar import action_grammar
from insula.tokens.grammar import Grammar, anything


@dataclasses.dataclass(frozen=True, eq=False)
class Utterance:
    """`tokens`, with the one that ends them; `ended`: whether that one came before the limit. `scores`: of each of them
    as if it were the answer to learn. `chunk`: what FAST tokens stand for, or why for nothing; None of words."""

    tokens: list[int]
    ended: bool
    scores: TokenScores
    chunk: Decoded | None


@dataclasses.dataclass(frozen=True, eq=False)
class Speech:
    """What was said when anything may be said; of an action also what was said within `action_grammar`, or in
    `unbound` why nothing could be."""

    free: Utterance
    bound: Utterance | None = None
    unbound: str | None = None


class Listener:
    """Asks the backbone with the prompts of samples. In float32, whatever the config computes in; nothing compiles
    before the first sample."""

    def __init__(self, assets: Assets) -> None:
        self.tokenizer = assets.tokenizer
        self.config = assets.config.with_compute(dtype="float32")
        self.limit = self.config.max_fast_len
        self._score = make_score(self.config)
        self._grammars: dict[tuple[int, int], Grammar] = {}

        # A grammar comes in as an argument: free text that ends with EOS and free text that ends with "|" share one
        # program.
        def say(params: Params, observation: Observation, grammar: Grammar, limit: Array) -> Generated:
            return generate(params, self.config, observation, grammar, limit, columns=bucket(self.limit))

        self._say = compiled_quickly(say)

    def hear(self, params: Params, sample: Sample) -> Speech:
        """What is said to the prompt of one sample."""
        source, vocab = sample.source, self.tokenizer.vocab_size
        hear = partial(self._hear, params, sample.batch)
        if not isinstance(source, Samples) or source.form is Form.SUBTASK:
            return Speech(hear(anything(vocab, self.tokenizer.text.eos_id)))

        free = hear(anything(vocab, self.tokenizer.stop_id), source.robot)
        try:
            grammar = self._grammar_of(source.robot)
        except InputError as error:
            return Speech(free, unbound=str(error))

        return Speech(free, hear(grammar, source.robot))

    def _grammar_of(self, robot: Robot) -> Grammar:
        """Raises InputError where the codec cannot spell every chunk, or none within the limit."""
        size = robot.horizon, robot.action_dim
        if size not in self._grammars:
            self._grammars[size] = action_grammar(self.tokenizer, *size)

        check_limit(self._grammars[size], self.limit)
        return self._grammars[size]

    def _hear(self, params: Params, batch: Batch, grammar: Grammar, robot: Robot | None = None) -> Utterance:
        """`robot`: whose chunk the tokens are to be, None where words are asked for."""
        asked = jax.device_get(as_served(batch, self.config))
        said = jax.device_get(self._say(params, asked, grammar, np.int32(self.limit)))

        tokens = said.row(0)
        scores = jax.device_get(self._score(params, _answered(batch, asked, tokens)))
        chunk = None if robot is None else self.tokenizer.actions_from(tokens, robot.horizon, robot.action_dim)
        return Utterance(tokens, bool(said.ended[0]), scores, chunk)


def teaches_backbone(sample: Sample) -> bool:
    """Whether samples like this one have taught the backbone to answer: not where their robot learns from the flow loss
    alone."""
    source = sample.source
    return not isinstance(source, Samples) or LossName.FAST in source.data.losses


def _answered(batch: Batch, asked: Observation, said: list[int]) -> Batch:
    """The sample with what was said as its answer, all of it scored."""
    # It always fits: what may be said is as long as what may follow a prompt.
    assert batch.observation.tokens is not None and asked.tokens is not None and asked.token_mask is not None
    start = int(asked.token_mask.sum())
    stop = start + len(said)

    tokens = np.array(batch.observation.tokens)
    tokens[0, start:stop] = said
    column = np.arange(tokens.shape[1])[None]
    answer = (column >= start) & (column < stop)

    observation = dataclasses.replace(batch.observation, tokens=tokens, token_mask=column < stop)
    return dataclasses.replace(batch, observation=observation, ar_mask=answer, loss_mask=answer)
