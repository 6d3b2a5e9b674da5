"""How an instruction, a state and an action are written as one sequence. A model is served as it was trained."""

import enum
import re
from dataclasses import dataclass

from insula.errors import InputError, did_you_mean


class Form(enum.StrEnum):
    """What is asked of one frame, and so which sequence is made of it (`insula.tokens.sequence`)."""

    FLAT = "flat"
    """The task, then the action."""
    SUBTASK = "subtask"
    """The task, then the subtask in words: what the backbone is to do first, and no action."""
    ACTIONS = "actions"
    """The task and its subtask, then the action."""

    @property
    def has_subtask(self) -> bool:
        """Whether a frame without a subtask cannot be written so."""
        return self is not Form.FLAT


@dataclass(frozen=True)
class Dialect:
    """One way of writing it::

        BOS prompt            bidirectional: all that serving sees
        action_head ids | EOS causal: all that is generated

    A prompt for each form, which holds {task}, {state} and in `actions_prompt` {subtask}; the stateless ones are for a
    state that reaches the model as a projected token. No two forms have one prompt: it alone says whether words or an
    action are asked for.
    """

    name: str
    prompt: str
    stateless_prompt: str
    subtask_prompt: str
    stateless_subtask_prompt: str
    actions_prompt: str
    stateless_actions_prompt: str
    action_head: str = ""
    """Causal text before the FAST ids."""
    score_all: bool = False
    """Whether the token loss scores the whole causal part, head and EOS too, or only the FAST ids and "|"."""
    lower: bool = False
    blanks: tuple[str, ...] = ("_",)
    """What becomes a space in the instruction."""

    def write(self, task: str, state_bins: list[int] | None, form: Form = Form.FLAT, subtask: str | None = None) -> str:
        """The bidirectional text. `subtask` is needed by, and only by, the form `actions`."""
        assert (subtask is not None) == (form is Form.ACTIONS)
        template = self._prompts(form)[state_bins is None]

        # Whatever a prompt does not hold is left aside by `format`.
        words = {"task": self.clean(task), "subtask": self.clean(subtask or "")}
        return template.format(**words, state=" ".join(map(str, state_bins or [])))

    def clean(self, text: str) -> str:
        """An instruction or a subtask as it is written: lower case and blanks as this dialect has them."""
        text = (text.lower() if self.lower else text).strip()
        for blank in self.blanks:
            text = text.replace(blank, " ")
        return text

    def state_span(self, text: str) -> tuple[int, int] | None:
        """Where in a bidirectional text of any form the state's bins are written, or None where it has none."""
        for form in Form:
            before, after = (_pattern(part) for part in self._prompts(form)[0].split("{state}"))
            if found := re.fullmatch(before + r"([\d ]+)" + after, text, re.DOTALL):
                return found.span(1)

        return None

    def _prompts(self, form: Form) -> tuple[str, str]:
        """With a state, and without."""
        match form:
            case Form.FLAT:
                return self.prompt, self.stateless_prompt
            case Form.SUBTASK:
                return self.subtask_prompt, self.stateless_subtask_prompt
            case Form.ACTIONS:
                return self.actions_prompt, self.stateless_actions_prompt


def _pattern(part: str) -> str:
    """A regular expression for a part of a prompt, any text where its fields are."""
    return re.sub(r"\\\{\w+\\\}", ".*", re.escape(part))


_ALL = (
    Dialect(
        name="pi05",
        prompt="Task: {task}, State: {state};\nAction: ",
        stateless_prompt="Task: {task};\nAction: ",
        subtask_prompt="Task: {task}, State: {state};\nSubtask: ",
        stateless_subtask_prompt="Task: {task};\nSubtask: ",
        actions_prompt="Task: {task}, Subtask: {subtask}, State: {state};\nAction: ",
        stateless_actions_prompt="Task: {task}, Subtask: {subtask};\nAction: ",
        blanks=("_", "\n"),
    ),
    Dialect(
        name="pi0",
        prompt="{task}, State: {state}\n",
        stateless_prompt="{task}\n",
        subtask_prompt="{task}, State: {state}\nSubtask: ",
        stateless_subtask_prompt="{task}\nSubtask: ",
        actions_prompt="{task}, Subtask: {subtask}, State: {state}\n",
        stateless_actions_prompt="{task}, Subtask: {subtask}\n",
        blanks=("_", "\n"),
    ),
    Dialect(
        name="pi0_fast",
        prompt="Task: {task}, State: {state};\n",
        stateless_prompt="Task: {task};\n",
        # "Action: " is generated here, and "Subtask: " is not: else both would follow one and the same prompt.
        subtask_prompt="Task: {task}, State: {state};\nSubtask: ",
        stateless_subtask_prompt="Task: {task};\nSubtask: ",
        actions_prompt="Task: {task}, Subtask: {subtask}, State: {state};\n",
        stateless_actions_prompt="Task: {task}, Subtask: {subtask};\n",
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
