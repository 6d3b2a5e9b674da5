"""The ways in which one set of weights acts. In all of them a failed decode is a typed result, and the caller holds.

flow       prompt ─► K/V ─► expert, ten Euler steps ─► chunk                        Policy
tokens     prompt ─► FAST tokens, one after another ─► chunk                        TokenPolicy (as π0-FAST)
subtask    prompt ─► "put the red block in the red bowl"                            SubtaskPolicy (π0.5, §IV)
           prompt with that subtask ─► K/V ─► expert ─► chunk
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from insula.batch import LossName
from insula.checks import check_integer
from insula.errors import DecodeError, InputError, InsulaError, TokenBudgetError
from insula.policy.acting import Inputs, Policy, Seed
from insula.policy.speaking import Said, Speaker
from insula.shapes import Float
from insula.tokens.fast_grammar import action_grammar
from insula.tokens.grammar import Grammar, anything

Chunk = np.ndarray | InsulaError
"""Actions [H, D] in the robot's units, or why there are none."""


class Mode(enum.StrEnum):
    """How a policy acts."""

    FLOW = "flow"
    TOKENS = "tokens"
    SUBTASK = "subtask"


class TokenPolicy:
    """Acts by FAST tokens alone: what the token loss has taught the backbone. `bound`: only whole chunks can be said;
    otherwise anything can, and what is no chunk is a DecodeError. Raises InputError where nothing taught it."""

    def __init__(self, policy: Policy, bound: bool = True) -> None:
        policy.require(LossName.FAST, "act in mode flow")
        self.policy = policy
        self.speaker = Speaker(policy)
        robot, tokenizer = policy.robot, policy.assets.tokenizer
        grammar = action_grammar if bound else _until_stop
        self.grammar = grammar(tokenizer, robot.horizon, robot.action_dim)

    def act(self, observation: dict[str, Any], seed: Seed = ()) -> Float[np.ndarray, "H D"]:
        """One chunk. Raises DecodeError where none was said, InputError as `Policy.act`."""
        chunk = self.act_batch([observation], [seed])[0]
        if isinstance(chunk, InsulaError):
            raise chunk

        return chunk

    def act_batch(self, observations: list[dict[str, Any]], seeds: Sequence[Seed]) -> list[Chunk]:
        """A chunk for each observation, or a DecodeError. Raises InputError as `Policy.act_batch`, and for a
        "previous": tokens do not go on from what is left of a chunk."""
        if any("previous" in observation for observation in observations):
            raise InputError("previous: chunks of FAST tokens cannot go on from the last one, expected none")

        seen = self.policy.observe(observations)
        return self.sample(Inputs(seen, None, np.stack([o["state"] for o in observations])), seeds)

    def sample(self, inputs: Inputs, seeds: Sequence[Seed]) -> list[Chunk]:
        """A chunk for each row of `inputs`, or a DecodeError. What is left of a last chunk is not gone on from."""
        said = self.speaker.say(inputs.observation, seeds, self.grammar)
        return [self._chunk(one, state) for one, state in zip(said, inputs.state, strict=True)]

    def _chunk(self, said: Said, state: np.ndarray) -> Chunk:
        robot = self.policy.robot
        decoded = self.policy.assets.tokenizer.actions_from(said.tokens, robot.horizon, robot.action_dim)
        if decoded.actions is None:
            return DecodeError(f"no chunk in these tokens, {decoded.invalid}")

        return robot.unnormalize_actions(decoded.actions.astype(np.float32), state)


def _until_stop(tokenizer: Any, horizon: int, action_dim: int) -> Grammar:
    return anything(tokenizer.vocab_size, tokenizer.stop_id)


@dataclass(frozen=True)
class Spoken:
    """A subtask that was said in an episode: seen at `step`, acted on from step `since`."""

    step: int
    since: int
    said: Said


PLACEHOLDER = "wait"
"""A subtask that nobody said, in a row of which nothing may come, or that programs are compiled with."""


def usable_subtask(policy: Policy, said: Said, observation: dict[str, Any]) -> str:
    """What was said, once it can be acted on. Raises DecodeError where it never ended, says nothing, or leaves no room
    for the rest of the prompt: whoever acts on it later could not tell why that is too long."""
    text = said.check("the subtask")
    try:
        state = policy.observer.normalize_state(np.asarray(observation["state"])[None])[0]
        policy.observer.tokenize(observation["task"], state, subtask=text)
    except TokenBudgetError as error:
        raise DecodeError(f"the subtask {text!r:.80} leaves no room: {error}") from None

    return text


class SubtaskPolicy:
    """Says the subtask, then acts on it. An observation that brings its own "subtask" is acted on as it is.

    `every`: steps after which it is said again. `lag`: steps that saying it takes, during which the last one is acted
    on, as where it is said beside the acting; the first is waited for. `known`: the only subtasks that may be said.

    Seeds are (…, step), and all before the step names an episode, which begins at step 0. `spoken` keeps, by episode,
    what was said. Raises InputError for an `every` or a `lag` that cannot be.
    """

    def __init__(self, policy: Policy, every: int = 1, lag: int = 0, known: Sequence[str] | None = None) -> None:
        check_integer("every", every, 1)
        check_integer("lag", lag, 0)
        self.policy = policy
        self.speaker = Speaker(policy)
        self.every = every
        self.lag = lag
        write = policy.assets.tokenizer.dialect.clean  # as they were written when they were learned
        self.grammar = None if known is None else self.speaker.choose_from(list(map(write, known)))
        self.spoken: dict[tuple[int, ...], list[Spoken]] = {}

    def think(self, observations: list[dict[str, Any]], seeds: Sequence[Seed]) -> list[Said]:
        """The subtask of each observation. Raises InputError as `Policy.act_batch`."""
        return self.speaker.say(self.policy.wonder(observations), seeds, self.grammar)

    def act(self, observation: dict[str, Any]) -> Float[np.ndarray, "H D"]:
        """One chunk, thought of anew. Raises DecodeError as `usable_subtask`, InputError as `Policy.act`."""
        if "subtask" not in observation:
            (said,) = self.think([observation], [(0,)])
            observation = observation | {"subtask": usable_subtask(self.policy, said, observation)}

        return self.policy.act(observation)

    def act_batch(self, observations: list[dict[str, Any]], seeds: Sequence[Seed]) -> list[Chunk]:
        """A chunk for each observation, or a DecodeError where its subtask cannot be acted on."""
        self._listen(observations, seeds)
        told = [self._tell(o, seed) for o, seed in zip(observations, seeds, strict=True)]
        chunks = self.policy.act_batch([o for o, _ in told], seeds)
        return [chunk if error is None else error for chunk, (_, error) in zip(chunks, told, strict=True)]

    def current(self, episode: tuple[int, ...], step: int) -> Said:
        """What is acted on at a step of an episode in which subtasks were said."""
        return next(one.said for one in reversed(self.spoken[episode]) if one.since <= step)

    def _listen(self, observations: list[dict[str, Any]], seeds: Sequence[Seed]) -> None:
        """Have the subtasks said that are due."""
        due = {}
        for row, (observation, (*name, step)) in enumerate(zip(observations, seeds, strict=True)):
            spoken = self.spoken.setdefault(tuple(name), [])
            if step == 0:
                spoken.clear()
            if "subtask" not in observation and (not spoken or step >= spoken[-1].step + self.every):
                due[tuple(name)] = row

        # All rows or none: one batch size, and so one compiled program.
        heard = self.think(observations, seeds) if due else []
        for episode, row in due.items():
            step = seeds[row][-1]
            since = step + self.lag if self.spoken[episode] else step
            self.spoken[episode].append(Spoken(step, since, heard[row]))

    def _tell(self, observation: dict[str, Any], seed: Seed) -> tuple[dict[str, Any], DecodeError | None]:
        """The observation with its subtask; or a prompt that fits, and why nothing may come of it."""
        if "subtask" in observation:
            return observation, None

        *episode, step = seed
        try:
            said = self.current(tuple(episode), step)
            return observation | {"subtask": usable_subtask(self.policy, said, observation)}, None
        except DecodeError as error:
            return observation | {"task": "", "subtask": PLACEHOLDER}, error
