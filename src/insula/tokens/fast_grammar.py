"""Which FAST ids make a whole chunk: exactly horizon · action_dim coefficients, no symbol cut in half, then "|".

A FAST id stands for bytes, and an id may end in the middle of a symbol (UTF-8: up to four bytes). So a state of this
grammar is a number of finished coefficients, and where in a symbol one is. Two ids that lead everywhere to the same
place are one class: 512 ids of a tabletop's codec are some forty.
"""

from functools import cache

import numpy as np

from insula.errors import InputError
from insula.tokens.grammar import OTHER, REFUSED, Grammar, shortest
from insula.tokens.sequence import FASTTokenizer

# Where in a symbol one is, and which bytes may come next (Unicode, table 3-7: no overlong form, no surrogate).
WHOLE, LAST, TWO, THREE, AFTER_E0, AFTER_ED, AFTER_F0, AFTER_F4 = PLACES = range(8)
_FIRST = (
    (range(0x80), WHOLE),
    (range(0xC2, 0xE0), LAST),
    (range(0xE0, 0xE1), AFTER_E0),
    (range(0xED, 0xEE), AFTER_ED),
    (range(0xE1, 0xF0), TWO),
    (range(0xF0, 0xF1), AFTER_F0),
    (range(0xF1, 0xF4), THREE),
    (range(0xF4, 0xF5), AFTER_F4),
)
_LATER = {
    LAST: (range(0x80, 0xC0), WHOLE),
    TWO: (range(0x80, 0xC0), LAST),
    THREE: (range(0x80, 0xC0), TWO),
    AFTER_E0: (range(0xA0, 0xC0), LAST),
    AFTER_ED: (range(0x80, 0xA0), LAST),
    AFTER_F0: (range(0x90, 0xC0), TWO),
    AFTER_F4: (range(0x80, 0x90), TWO),
}


def action_grammar(tokenizer: FASTTokenizer, horizon: int, action_dim: int) -> Grammar:
    """What `FASTTokenizer.actions_from` reads as a chunk [horizon, action_dim], and nothing else: the dialect's head
    first, where it has one.

    Raises InputError where the codec cannot spell some chunk: it lacks single bytes.
    """
    head, codec = tokenizer.action_head, tokenizer.fast
    coefficients = horizon * action_dim

    # A token is known by where it leads from each place in a symbol. `head` and "|" are classes of their own.
    kinds: dict[tuple, int] = {}
    token_class = np.full(tokenizer.vocab_size, OTHER, np.int32)
    for i in range(codec.size):
        moves = tuple(_walk(codec.bytes_of([i]), place) for place in PLACES)
        token_class[tokenizer.fast_last_id - i] = kinds.setdefault(moves, len(kinds) + 1)

    others = dict.fromkeys([*head, tokenizer.stop_id])
    for number, token in enumerate(others, start=len(kinds) + 1):
        token_class[token] = number

    # States: the head's, then (coefficients so far, place), then the end.
    begin = len(head)
    end = begin + (coefficients + 1) * len(PLACES)
    following = np.full((end + 1, len(kinds) + len(others) + 1), REFUSED, np.int32)
    for state, token in enumerate(head):
        following[state, token_class[token]] = state + 1

    done = np.arange(coefficients + 1)
    for moves, kind in kinds.items():
        for place, move in enumerate(moves):
            if move is None:
                continue
            finished, after = move
            # With all coefficients there no symbol may be begun.
            fits = done + finished + (after != WHOLE) <= coefficients
            following[begin + done[fits] * len(PLACES) + place, kind] = (
                begin + (done[fits] + finished) * len(PLACES) + after
            )

    following[begin + coefficients * len(PLACES) + WHOLE, token_class[tokenizer.stop_id]] = end
    return _reachable(Grammar(token_class, following, np.zeros(end + 1, np.int32)))


@cache
def _step(byte: int, place: int) -> int | None:
    """The place after one more byte, or None where UTF-8 has no such byte there."""
    if place == WHOLE:
        return next((after for span, after in _FIRST if byte in span), None)

    span, after = _LATER[place]
    return after if byte in span else None


def _walk(symbols: bytes, place: int) -> tuple[int, int] | None:
    """How many symbols these bytes finish from `place`, and where they end; None where they cannot come there."""
    finished = 0
    for byte in symbols:
        after = _step(byte, place)
        if after is None:
            return None
        finished += after == WHOLE
        place = after

    return finished, place


def _reachable(grammar: Grammar) -> Grammar:
    """Without the states that no answer passes through. Raises InputError where one of the others leads nowhere."""
    following = grammar.following
    known = np.zeros(len(following), bool)
    known[[0, -1]] = True
    while True:
        after = following[known]
        more = known.copy()
        more[after[after != REFUSED]] = True
        if np.array_equal(more, known):
            break
        known = more

    number = np.cumsum(known) - 1
    kept = following[known]
    kept = np.where(kept == REFUSED, REFUSED, number[kept]).astype(np.int32)
    try:
        return Grammar(grammar.token_class, kept, shortest(kept))
    except InputError:
        raise InputError(
            "this FAST codec cannot spell every chunk: it was fitted without all 256 byte symbols; fit it again with "
            "FASTCodec.fit, or decode without a grammar"
        ) from None
