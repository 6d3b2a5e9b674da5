"""The tasks of the tabletop: how each draws its scenes and its goals, and in which words it asks. docs/tasks.md."""

from insula.errors import InputError, did_you_mean
from insula.worlds.tabletop.tasks.distractors import DISTRACTORS
from insula.worlds.tabletop.tasks.moving import MOVING
from insula.worlds.tabletop.tasks.put import PUT
from insula.worlds.tabletop.tasks.relation import RELATION
from insula.worlds.tabletop.tasks.sort import SORT
from insula.worlds.tabletop.tasks.stack import STACK
from insula.worlds.tabletop.tasks.task import Task
from insula.worlds.tabletop.tasks.unseen_pairs import UNSEEN_PAIRS

TASKS: dict[str, Task] = {task.name: task for task in (PUT, SORT, STACK, RELATION, UNSEEN_PAIRS, DISTRACTORS, MOVING)}
ALL = "all"
"""In place of a name, where several tasks may be asked for."""


def find_task(name: str) -> Task:
    """Raises InputError for a name that is none of `TASKS`."""
    if name not in TASKS:
        raise InputError(f"task: got {name!r}, expected one of {', '.join(TASKS)}{did_you_mean(str(name), TASKS)}")

    return TASKS[name]


def named_tasks(name: str) -> tuple[str, ...]:
    """This task's name, or those of all where it is `ALL`. Raises InputError for any other."""
    if name == ALL:
        return tuple(TASKS)
    if name not in TASKS:
        known = (*TASKS, ALL)
        raise InputError(f"task: got {name!r}, expected one of {', '.join(known)}{did_you_mean(str(name), known)}")

    return (name,)
