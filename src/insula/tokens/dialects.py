"""How an instruction, a state and an action are written as one sequence. A model is served as it was trained."""

import re
from dataclasses import dataclass

from insula.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Dialect:
    """One way of writing it::

        BOS prompt            bidirectional: all that serving sees
        action_head ids | EOS causal: all that is generated

    `prompt` holds {task} and {state}; `stateless_prompt` is for a state that reaches the model as a projected token.
    """

    name: str
    prompt: str
    stateless_prompt: str
    action_head: str = ""
    """Causal text before the FAST ids."""
    score_all: bool = False
    """Whether the token loss scores the whole causal part, head and EOS too, or only the FAST ids and "|"."""
    lower: bool = False
    blanks: tuple[str, ...] = ("_",)
    """What becomes a space in the instruction."""

    def write(self, task: str, state_bins: list[int] | None) -> str:
        """The bidirectional text."""
        task = (task.lower() if self.lower else task).strip()
        for blank in self.blanks:
            task = task.replace(blank, " ")
        if state_bins is None:
            return self.stateless_prompt.format(task=task)
        return self.prompt.format(task=task, state=" ".join(map(str, state_bins)))

    def state_span(self, text: str) -> tuple[int, int] | None:
        """Where in a bidirectional text the state's bins are written, or None where it has none."""
        before, after = (re.escape(part) for part in self.prompt.split("{state}"))
        found = re.fullmatch(before.replace(re.escape("{task}"), ".*") + r"([\d ]+)" + after, text, re.DOTALL)
        return found and found.span(1)


_ALL = (
    Dialect(
        name="pi05",
        prompt="Task: {task}, State: {state};\nAction: ",
        stateless_prompt="Task: {task};\nAction: ",
        blanks=("_", "\n"),
    ),
    Dialect(
        name="pi0",
        prompt="{task}, State: {state}\n",
        stateless_prompt="{task}\n",
        blanks=("_", "\n"),
    ),
    Dialect(
        name="pi0_fast",
        prompt="Task: {task}, State: {state};\n",
        stateless_prompt="Task: {task};\n",
        action_head="Action: ",
        score_all=True,
        lower=True,
    ),
)

DIALECTS = {dialect.name: dialect for dialect in _ALL}


def dialect(name: str) -> Dialect:
    """The named dialect. Raises InputError with the nearest name where there is none."""
    if name not in DIALECTS:
        raise InputError(f"no prompt dialect {name!r}{did_you_mean(name, DIALECTS)}; known: {', '.join(DIALECTS)}")
    return DIALECTS[name]
