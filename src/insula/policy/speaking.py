"""What a policy's backbone says: FAST tokens, subtasks and answers are decoded by one compiled program."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import numpy as np

from insula.batch import Observation
from insula.data.texts import is_blank
from insula.decode.tokens import Generated, Sampling, bucket, check_limit, generate
from insula.errors import DecodeError, InputError, NonFiniteError
from insula.model.params import Params
from insula.policy.acting import Policy, Seed, noise_key
from insula.shapes import Array, Shaped, UInt8
from insula.tokens.grammar import Grammar, anything, one_of


@dataclasses.dataclass(frozen=True)
class Said:
    """One answer: its tokens, the stop token among them, with the model's log-probability of each; and as text.
    `ended`: whether it came to its end; else it was cut off at the limit and means nothing."""

    tokens: list[int]
    log_probs: list[float]
    ended: bool
    text: str

    @property
    def probability(self) -> float:
        """That the model says exactly this."""
        return math.exp(sum(self.log_probs))

    def check(self, what: str) -> str:
        """The text. Raises DecodeError where it never ended, or says nothing."""
        if not self.ended:
            raise DecodeError(f"{what} did not end within {len(self.tokens)} tokens: {self.text!r:.80}")
        if is_blank(self.text):
            raise DecodeError(f"{what} says nothing: {self.text!r:.80}")

        return self.text


class Speaker:
    """Says things with the weights of `policy`. Each batch size, and each bucket of lengths, compiles once; and each
    size of a grammar."""

    def __init__(self, policy: Policy, sampling: Sampling | None = None) -> None:
        self.policy = policy
        self.tokenizer = policy.assets.tokenizer
        self.limit = policy.config.max_fast_len
        self.words = anything(self.tokenizer.vocab_size, self.tokenizer.text.eos_id, but=self.tokenizer.fast_ids)

        # Parameters come in as an argument: closed over, they would be constants of every compiled program.
        def say(
            params: Params,
            observation: Observation,
            grammar: Grammar,
            limit: Array,
            keys: Shaped[Array, "B 2"],
            columns: int,
        ) -> Generated:
            wrapped = jax.vmap(partial(jax.random.wrap_key_data, impl="threefry2x32"))(keys)
            return generate(params, policy.config, observation, grammar, limit, columns, sampling, wrapped)

        self._say = jax.jit(say, static_argnames="columns")

    def say(
        self, observation: Observation, seeds: Sequence[Seed], grammar: Grammar | None = None, limit: int | None = None
    ) -> list[Said]:
        """What follows each prompt of `observation`: words unless bound by a grammar, at most `limit` tokens (the
        model's `max_fast_len`). `seeds`: as `Policy.act_batch` has them. Raises InputError where no answer fits,
        NonFiniteError where the weights know of no likeliest token."""
        grammar, limit = grammar or self.words, limit or self.limit
        check_limit(grammar, limit)
        keys = np.stack([noise_key(self.policy.seed, *seed) for seed in seeds])
        said = self._say(self.policy.params, observation, grammar, np.int32(limit), keys, columns=bucket(limit))
        said = jax.device_get(said)
        return [self._read(said, row) for row in range(len(seeds))]

    def choose_from(self, answers: Sequence[str]) -> Grammar:
        """One of these texts. Raises InputError for none, and for one that is too long to be said."""
        text = self.tokenizer.text
        written = list(map(text.encode, answers))
        for answer, tokens in zip(answers, written, strict=True):
            if len(tokens) + 1 > self.limit:  # with its end; the others would be all that can be said
                raise InputError(
                    f"the answer {answer!r:.80} takes {len(tokens) + 1} tokens, the limit is {self.limit}; shorten it"
                )

        return one_of(written, self.tokenizer.vocab_size, text.eos_id)

    def ask(
        self,
        images: Mapping[str, UInt8[np.ndarray, "B h w 3"]],
        questions: Sequence[str],
        grammar: Grammar | None = None,
    ) -> list[Said]:
        """An answer to each question about the pictures of its row; cameras that are not shown are masked, as in
        training. Raises InputError for a camera that the model does not have, TokenBudgetError for a question that is
        too long."""
        rows = [self.tokenizer.question(question) for question in questions]
        no_state = np.zeros((len(rows), self.policy.robot.state_dim), np.float32)
        return self.say(self.policy.show(images, no_state, rows), [(row,) for row in range(len(rows))], grammar)

    def _read(self, said: Generated, row: int) -> Said:
        tokens = said.row(row)
        log_probs = [float(value) for value in said.log_probs[row, : len(tokens)]]
        if not np.isfinite(log_probs).all():  # a grammar would make a whole chunk of it
            raise NonFiniteError("the backbone's logits are NaN or infinite; look at the weights of this checkpoint")
        return Said(tokens, log_probs, bool(said.ended[row]), self.tokenizer.text_from(tokens))
