"""What a generated answer may be, as a finite automaton over tokens: whatever it generates can be read back.

    put the ─► red ──► block in ...      a state for each place in an answer, an arrow for each token that may follow
            ╰► blue ─► block in ...      the last state: nothing follows

Every state knows how many more tokens an answer needs at least. A token is refused if, after it, what is left of the
budget could not hold the rest: so an answer that is bound by a grammar always ends within its budget.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from insula.errors import InputError
from insula.shapes import AnyArray, Int

REFUSED = -1
OTHER = 0
"""The class of tokens that no arrow of the grammar names."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Grammar:
    """`following[s, c]`: the state after a token of class c in state s, or REFUSED; `token_class[token]`; `needed[s]`:
    tokens that must still come, at least. The first state is the start, the last one the end.

    Free text has needed = 0 everywhere: nothing makes it end, and it may be found not to have ended.
    """

    token_class: Int[AnyArray, "V"]
    following: Int[AnyArray, "n _"]
    needed: Int[AnyArray, "n"]

    @property
    def end(self) -> int:
        """The state in which an answer is complete."""
        return len(self.following) - 1

    def accepts(self, tokens: Iterable[int]) -> bool:
        """Whether these tokens, in this order, lead from the start to the end."""
        state = 0
        for token in tokens:
            state = int(self.following[state, self.token_class[token]])
            if state == REFUSED:
                return False

        return state == self.end


def anything(vocab_size: int, stop: int, but: Sequence[int] = ()) -> Grammar:
    """Any token, until `stop`; none of `but`."""
    token_class = np.zeros(vocab_size, np.int32)
    token_class[np.asarray(but, np.int32)] = 2
    token_class[stop] = 1
    following = np.array([[0, 1, REFUSED], [REFUSED, REFUSED, REFUSED]], np.int32)
    return Grammar(token_class, following, np.zeros(2, np.int32))


def one_of(answers: Iterable[Sequence[int]], vocab_size: int, stop: int) -> Grammar:
    """One of these sequences of tokens, then `stop`. Raises InputError for no answers, or an empty one."""
    arrows: list[dict[int, int]] = [{}]
    whole = set()
    for answer in answers:
        if not len(answer):
            raise InputError("grammar: an answer has no tokens; leave it out")
        state = 0
        for token in answer:
            # A tree of prefixes: answers that begin alike share their states.
            state = arrows[state].setdefault(token, len(arrows))
            if state == len(arrows):
                arrows.append({})
        whole.add(state)

    if not whole:
        raise InputError("grammar: no answers to choose from; give at least one")

    end = len(arrows)
    arrows.append({})
    for state in whole:
        arrows[state][stop] = end

    return _from_arrows(arrows, vocab_size)


def any_of(tokens: Sequence[int], count: int, vocab_size: int, stop: int) -> Grammar:
    """Exactly `count` tokens, each one of `tokens`, then `stop`. Raises InputError for no tokens, or a count of 0."""
    if not len(tokens) or count < 1:
        raise InputError(f"grammar: {count} tokens out of {len(tokens)}, expected at least 1 of each")

    token_class = np.zeros(vocab_size, np.int32)
    token_class[np.asarray(tokens)] = 1
    token_class[stop] = 2
    following = np.full((count + 2, 3), REFUSED, np.int32)
    following[np.arange(count), 1] = np.arange(1, count + 1)
    following[count, 2] = count + 1
    return Grammar(token_class, following, shortest(following))


def _from_arrows(arrows: Sequence[dict[int, int]], vocab_size: int) -> Grammar:
    """`arrows[s][token]`: the state after it."""
    named = sorted({token for arrow in arrows for token in arrow})
    token_class = np.full(vocab_size, OTHER, np.int32)
    token_class[named] = np.arange(1, len(named) + 1)

    following = np.full((len(arrows), len(named) + 1), REFUSED, np.int32)
    for state, arrow in enumerate(arrows):
        for token, after in arrow.items():
            following[state, token_class[token]] = after

    return Grammar(token_class, following, shortest(following))


def shortest(following: Int[np.ndarray, "n _"]) -> Int[np.ndarray, "n"]:
    """The fewest tokens from each state to the end. Raises InputError where it cannot be reached from one of them."""
    far = len(following) + 1  # farther than any path without a circle
    needed = np.full(len(following), far)
    needed[-1] = 0

    # Bellman's iteration: after round i every state that is i tokens from the end knows it.
    while True:
        after = np.where(following == REFUSED, far, needed[following]).min(axis=1)
        better = np.minimum(needed, after + 1)
        if np.array_equal(better, needed):
            break
        needed = better

    if lost := np.flatnonzero(needed >= far).tolist():
        raise InputError(f"grammar: the end cannot be reached from state {lost[0]}")

    return needed.astype(np.int32)
