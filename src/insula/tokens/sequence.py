"""Instruction, state and action as one sequence of tokens with its masks.

    tokens      BOS Task : ... Action :   f0  f1  f2  |   EOS  pad pad
    ar_mask      0   0   0  0    0    0    1   1   1  1    1    0   0    causal from here on
    loss_mask    0   0   0  0    0    0    1   1   1  1    0    0   0    scored

With a subtask, one frame makes two more sequences (`insula.tokens.dialects.Form`):

    actions     BOS Task : ... Subtask : ... Action :  |  f0 f1 f2 | EOS     the expert reads the subtask it is given
    subtask     BOS Task : ... Subtask :  |  pick up the cup EOS             all of the answer is scored

Serving sees exactly the columns before the first causal one. FAST ids live in the text vocabulary, counted down from
`fast_last_id` (π0-FAST's rule): id t is token `fast_last_id − t`, inverted arithmetically, never through text.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, takewhile
from operator import index
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from insula.errors import InputError, TokenBudgetError, did_you_mean
from insula.files import read_json, write_json
from insula.tokens import text as texts
from insula.tokens.dialects import Form
from insula.tokens.dialects import dialect as named_dialect
from insula.tokens.fast import Decoded, FASTCodec
from insula.tokens.text import TextTokenizer

PALIGEMMA_FAST_LAST_ID = 257_152 - 1 - 128
"""`fast_last_id` of π0-FAST: below the segmentation tokens, over the location tokens and rare pieces."""
SEQUENCE_FILE = "sequence.json"
# The 256 bins of π0-FAST. Inner edges only: `digitize` then puts what lies beyond −1 or 1 into the outermost bin.
STATE_EDGES = np.linspace(-1, 1, 257)[1:-1]
STOP = "|"


@dataclass(frozen=True, eq=False)
class Tokenized:
    """One sample, each [max_token_len]: tokens int32; token_mask, ar_mask, loss_mask bool. Padding only at the end."""

    tokens: np.ndarray
    token_mask: np.ndarray
    ar_mask: np.ndarray
    loss_mask: np.ndarray


class FASTTokenizer:
    """Samples to sequences, and generated ids back to actions.

    `max_token_len` columns. With `max_prompt_len`, the bidirectional part must fit in that many (the action expert
    reads no further) and the causal part in the rest (the token loss scores no more). `fast_last_id` None puts the FAST
    ids right after the text vocabulary. `score_eos` also scores EOS after an action.
    """

    def __init__(
        self,
        text: TextTokenizer,
        fast: FASTCodec,
        dialect: str = "pi05",
        *,
        max_token_len: int,
        max_prompt_len: int | None = None,
        fast_last_id: int | None = None,
        score_eos: bool = False,
    ) -> None:
        """Raises InputError for an unknown dialect, limits that contradict each other, a `fast_last_id` that puts FAST
        ids over a control token, or a text tokenizer in which "|" is not one token."""
        prompt_limit = max_token_len if max_prompt_len is None else max_prompt_len
        if not 0 < prompt_limit <= max_token_len:
            raise InputError(
                f"max_prompt_len is {max_prompt_len}, max_token_len {max_token_len}; expected 0 < prompt ≤ all"
            )

        # One token, because a generated action is known to have ended by a single comparison.
        stop = text.encode(STOP)
        if len(stop) != 1:
            raise InputError(f"the text tokenizer gives {len(stop)} tokens for {STOP!r}, expected 1: it ends an action")

        self.text = text
        self.fast = fast
        self.dialect = named_dialect(dialect)
        self.max_token_len = max_token_len
        self.max_prompt_len = max_prompt_len
        self.score_eos = score_eos
        self.stop_id = stop[0]

        # After the text by default: over text entries, as in π0-FAST, saves embedding rows and costs those words.
        self.fast_last_id = text.vocab_size + fast.vocab_size - 1 if fast_last_id is None else fast_last_id
        self.action_head = text.encode(self.dialect.action_head)

        # An id that is a FAST token and ends the sequence at once could not be told apart when it is generated.
        first = self.fast_ids.start
        taken = {"BOS": text.bos_id, "EOS": text.eos_id, "padding": text.pad_id, STOP: self.stop_id}
        for name, token in taken.items():
            if first < 0 or first <= token <= self.fast_last_id:
                raise InputError(
                    f"fast_last_id {self.fast_last_id} puts the {fast.vocab_size} FAST ids at {first} … "
                    f"{self.fast_last_id}; expected all ≥ 0 and clear of {name} at {token}"
                )

    @property
    def fast_ids(self) -> range:
        """The ids of FAST tokens, wherever the text's are."""
        return range(self.fast_last_id - self.fast.vocab_size + 1, self.fast_last_id + 1)

    @property
    def vocab_size(self) -> int:
        """Entries the model's embedding needs: text and FAST."""
        return max(self.text.vocab_size, self.fast_last_id + 1)

    def tokenize(
        self,
        prompt: str,
        state: np.ndarray | None,
        actions: np.ndarray | None = None,
        subtask: str | None = None,
    ) -> Tokenized:
        """One sample of the form `flat`, or `actions` where there is a `subtask`. `state` [S] normalized to [−1, 1], or
        None where the model takes it as a projected token; `actions` [H, D] normalized, or None when serving: then
        exactly the training sequence's bidirectional part.

        Raises TokenBudgetError where a part is too long, InputError for NaN or infinity and wrong ranks.
        """
        # Prefix and suffix are encoded apart: in one string a token could lie across the border, and serving, which has
        # the prefix alone, would get other tokens than training did.
        prefix = self._prefix(prompt, state, Form.FLAT if subtask is None else Form.ACTIONS, subtask)
        if actions is None:
            return self._sequence(prefix, [], [], "action")

        # The head and EOS are the same in every sample: scored, as one dialect does, they water down the mean.
        ids = [*(self.fast_last_id - i for i in self.fast.encode(actions)), self.stop_id]
        scores = [self.dialect.score_all] * len(self.action_head) + [True] * len(ids)
        suffix = [*self.action_head, *ids, self.text.eos_id]
        return self._sequence(prefix, suffix, [*scores, self.dialect.score_all or self.score_eos], "action")

    def think(self, prompt: str, state: np.ndarray | None, subtask: str | None = None) -> Tokenized:
        """A sample of the form `subtask`: the prompt asks for it (bidirectional), then the subtask and EOS (causal, all
        scored). `subtask` None when asking. Written as `tokenize` writes it into its prompt, so that what is generated
        here can be given there.

        Raises TokenBudgetError and InputError as `tokenize` does.
        """
        prefix = self._prefix(prompt, state, Form.SUBTASK)
        suffix = [] if subtask is None else [*self.text.encode(self.dialect.clean(subtask)), self.text.eos_id]
        return self._sequence(prefix, suffix, [True] * len(suffix), "subtask")

    def question(self, question: str, answer: str | None = None) -> Tokenized:
        """A vision-language sample: BOS, the question and a newline (bidirectional), then the answer and EOS (causal,
        all scored). `answer` None when asking. Raises TokenBudgetError where a part is too long."""
        suffix = [] if answer is None else [*self.text.encode(answer), self.text.eos_id]
        return self._sequence(self.text.encode(f"{question}\n"), suffix, [True] * len(suffix), "answer")

    def actions_from(self, ids: Iterable[SupportsIndex], horizon: int, action_dim: int) -> Decoded:
        """The chunk [horizon, action_dim] in generated token ids, which end at the first "|", or why there is none."""
        # The head is text that some dialects generate first. Where a caller has cut it off already, that is fine as
        # well.
        tokens = [index(i) for i in ids]
        head = len(self.action_head) if tokens[: len(self.action_head)] == self.action_head else 0

        # Without an end the chunk may have been cut off in the middle: to be said, never to be filled up.
        if self.stop_id not in tokens:
            return Decoded(None, f"because no {STOP!r} ends the action within {len(tokens)} tokens")

        fast = []
        for position, i in enumerate(tokens[head : tokens.index(self.stop_id)], start=head):
            if not 0 <= self.fast_last_id - i < self.fast.vocab_size:
                return Decoded(None, f"because token {i} at position {position} is no FAST token")
            fast.append(self.fast_last_id - i)

        return self.fast.decode(fast, horizon, action_dim)

    def text_from(self, ids: Iterable[SupportsIndex]) -> str:
        """Generated token ids, up to EOS, as text; ids that are no text are written as "<3199>"."""
        answer = takewhile(lambda i: i != self.text.eos_id, map(index, ids))
        runs = groupby(answer, key=lambda i: 0 <= i < self.text.vocab_size)
        return "".join(self.text.decode(run) if is_text else "".join(f"<{i}>" for i in run) for is_text, run in runs)

    def save(self, path: str | Path) -> None:
        """Write all of it into a directory: `load` needs nothing else."""
        path = Path(path)
        self.text.save(path / "text")
        self.fast.save(path / "fast")
        settings = {key: getattr(self, key) for key in _SETTINGS if key != "dialect"}
        write_json(path / SEQUENCE_FILE, {"dialect": self.dialect.name, **settings})

    @classmethod
    def load(cls, path: str | Path) -> "FASTTokenizer":
        """Read what `save` wrote. Raises MissingFileError, or InputError naming what is malformed."""
        path = Path(path)
        settings = read_json(path / SEQUENCE_FILE)

        # Strictly, both ways: a setting that is ignored, or filled in by a default, would write other sequences than
        # those the model was trained on, and nothing would fail.
        for key in settings:
            if key not in _SETTINGS:
                raise InputError(f"{path / SEQUENCE_FILE}: unknown setting {key!r}{did_you_mean(key, _SETTINGS)}")

        for key, kind in _SETTINGS.items():
            if type(settings.get(key)) not in kind:
                raise InputError(f"{path / SEQUENCE_FILE}: {key} is {settings.get(key)!r}, expected {kind[0].__name__}")

        return cls(texts.load_text_tokenizer(path / "text"), FASTCodec.load(path / "fast"), **settings)

    def _prefix(self, prompt: str, state: np.ndarray | None, form: Form, subtask: str | None = None) -> list[int]:
        """Ids of the bidirectional text."""
        bins = None if state is None else state_bins(state)
        return self.text.encode(self.dialect.write(prompt, bins, form, subtask))

    def _sequence(self, prefix: list[int], suffix: list[int], scored: list[bool], part: str) -> Tokenized:
        """BOS and prefix, then suffix, then padding."""
        # Two limits and not one: the expert's memory ends after max_prompt_len text columns, and the token loss has
        # slots for the rest. Under one limit a long prompt would reach past the memory unseen.
        prefix = [self.text.bos_id, *prefix]
        length, whole = len(prefix) + len(suffix), self.max_token_len
        prompt_limit = self.max_prompt_len or whole
        suffix_limit = whole - self.max_prompt_len if self.max_prompt_len else whole
        for name, taken, limit, remedy in (
            ("prompt", len(prefix), prompt_limit, "shorten its texts or raise max_prompt_len"),
            (part, len(suffix), suffix_limit, "shorten it or raise max_token_len − max_prompt_len"),
            (f"prompt with its {part}", length, whole, "shorten it or raise max_token_len"),
        ):
            if taken > limit:
                raise TokenBudgetError(name, taken, limit, remedy)

        # `ar_mask` is 0 in the padding too, so it opens no block there; `token_mask` is what hides it.
        tokens = np.full(self.max_token_len, self.text.pad_id, np.int32)
        token_mask, ar_mask, loss_mask = np.zeros((3, self.max_token_len), bool)
        tokens[:length] = prefix + suffix
        token_mask[:length] = True
        ar_mask[len(prefix) : length] = True
        loss_mask[len(prefix) : length] = scored

        return Tokenized(tokens, token_mask, ar_mask, loss_mask)


_SETTINGS: dict[str, tuple[type, ...]] = {
    "dialect": (str,),
    "max_token_len": (int,),
    "max_prompt_len": (int, type(None)),
    "fast_last_id": (int,),
    "score_eos": (bool,),
}


def state_bins(state: np.ndarray) -> list[int]:
    """Each value of a normalized state [S] as one of 256 bins over [−1, 1]; beyond it, the outermost.

    Raises InputError for a wrong rank, NaN or infinity, naming the entry.
    """
    # Clipped at the ends, unlike actions, which must encode exactly: a state a little out of range is still the nearest
    # thing that the model has seen.
    state = np.asarray(state)
    if state.ndim != 1 or state.dtype.kind not in "fiu":
        raise InputError(f"state is {state.dtype}{list(state.shape)}, expected real numbers [S]")

    finite = np.isfinite(state)
    if not finite.all():
        first = int(np.argmin(finite))
        raise InputError(f"state[{first}] is {state[first]}, expected finite numbers")

    return np.digitize(state, STATE_EDGES).tolist()
