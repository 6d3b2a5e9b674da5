"""Which data a run learns from, as a TOML file: nobody edits code to add a data set. `insula data describe` writes one.

[robots.arm]                                  a LeRobot data set
path = "recordings/arm"                       relative to this file
state = ["observation.state"]                 columns, joined in this order; or {column = "...", dims = [0, 1, 2]}
actions = ["action"]
cameras = { front = "observation.images.top" }        the model's name = the data set's
weight = 3.0                                  how often it is drawn, relative to the others
subtasks = "subtask_index"                    which step of its task each frame is (insula.data.subtasks)
forms = { subtask = 1, actions = 3 }          what is asked of a frame, how often (insula.tokens.dialects.Form)

[questions.scenes]                            images with questions and answers (insula.data.questions)
path = "questions"
camera = "front"
"""

import dataclasses
import re
import tomllib
from collections.abc import Mapping as Table
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, get_args

from insula.batch import LossName
from insula.data.normalize import Kind
from insula.errors import DatasetError, did_you_mean
from insula.files import as_path
from insula.tokens.dialects import Form

LARGEST_WEIGHT = 1e6
"""Only the ratio of two weights counts, and one source of a million is as good as alone."""
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
LINES = ".jsonl"
"""How `subtasks` ends where it names a file, and no column."""
USUAL_FORMS = {Form.SUBTASK: 1.0, Form.ACTIONS: 3.0}
"""Of a robot with subtasks. Words are few and repeat, actions are many: three quarters of the samples stay those."""


@dataclass(frozen=True)
class Columns:
    """A column of numbers, or some of its dimensions."""

    column: str
    dims: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RobotData:
    """A LeRobot data set and how the model is to read it."""

    path: Path
    cameras: dict[str, str]
    state: tuple[Columns, ...] = (Columns(STATE),)
    """May be empty: the model then sees images and the instruction alone."""
    actions: tuple[Columns, ...] = (Columns(ACTION),)
    weight: float = 1.0
    horizon: int | None = None
    """Steps of its chunks, at most the model's, which it is unless given."""
    delta: tuple[int, ...] = ()
    """Action dimensions to learn relative to the state's dimension of the same number, at the start of the chunk."""
    normalization: Kind = "quantiles"
    statistics: Path | None = None
    """A norm_stats.json to use; fitted to the training episodes unless given."""
    instruction: str | None = None
    """A column of text; the task of each frame unless given."""
    subtasks: str | Path | None = None
    """What says which step of the task each frame is: a column, or a file of lines (`insula.data.subtasks`)."""
    forms: dict[Form, float] = field(default_factory=dict)
    """How often each form is drawn of this robot's samples, relative to the others; `shares` unless given."""
    losses: tuple[LossName, ...] = tuple(LossName)
    """Without "fast" its actions teach the expert alone, without "flow" the backbone alone."""
    units: dict[str, str] = field(default_factory=dict)
    """What "state" and "actions" are measured in; kept in the checkpoint for whoever serves it."""

    @property
    def shares(self) -> dict[Form, float]:
        """The share of each form, all together 1."""
        usual = {Form.FLAT: 1.0} if self.subtasks is None else USUAL_FORMS
        forms = self.forms or usual
        return {form: weight / sum(forms.values()) for form, weight in forms.items()}


@dataclass(frozen=True)
class QuestionData:
    """A folder or a file of images with questions and answers."""

    path: Path
    camera: str | None = None
    """The model's camera that a row's "image" is shown as; rows that name their cameras ("images") need none."""
    weight: float = 1.0


@dataclass(frozen=True)
class Source:
    """What batches are drawn from, by `weight`: one form of the samples of a robot, or questions, which have none."""

    entry: str
    form: Form | None
    weight: float


@dataclass(frozen=True)
class Mapping:
    """All data of a run by name: at least one robot, and no name twice."""

    robots: dict[str, RobotData]
    questions: dict[str, QuestionData] = field(default_factory=dict)

    @property
    def sources(self) -> dict[str, Source]:
        """Of the robots, then of the questions: by name, which is the entry's own, and for a form other than `flat`
        "arm:actions" and so on (no entry has a colon in its name)."""
        robots = {
            name if form is Form.FLAT else f"{name}:{form}": Source(name, form, robot.weight * share)
            for name, robot in self.robots.items()
            for form, share in robot.shares.items()
        }
        return robots | {name: Source(name, None, float(entry.weight)) for name, entry in self.questions.items()}

    @property
    def weights(self) -> list[float]:
        """Of the sources, in their order."""
        return [source.weight for source in self.sources.values()]


def narrowed(mapping: Mapping, losses: tuple[LossName, ...], questions: bool) -> Mapping:
    """A mapping of which only these losses are learned, and questions only if so. Without "fast" nothing teaches words,
    so questions and the form `subtask` are left out. Raises DatasetError where nothing is left of a robot."""
    robots = {}
    for name, robot in mapping.robots.items():
        left = tuple(loss for loss in robot.losses if loss in losses)
        if not left:
            raise DatasetError(
                f"robots.{name}.losses is {', '.join(robot.losses)}, and this training has {', '.join(losses)} alone: "
                "nothing of it would be learned"
            )

        shares = robot.shares
        if LossName.FAST not in left and Form.SUBTASK in shares:
            shares.pop(Form.SUBTASK)
            if not shares:
                raise DatasetError(
                    f"robots.{name}.forms is subtask alone, which the loss 'fast' teaches; it is left out"
                )
            robot = dataclasses.replace(robot, forms=shares)
        robots[name] = dataclasses.replace(robot, losses=left)

    return Mapping(robots, mapping.questions if questions and LossName.FAST in losses else {})


def read_mapping(path: Path, cameras: tuple[str, ...] | None = None) -> Mapping:
    """A TOML file; or a LeRobot folder whose columns have LeRobot's own names, with the model's `cameras`. Without
    them, cameras are neither expected nor checked.

    Raises DatasetError naming the file, the entry and the nearest known name.
    """
    # Checkpoints of this robot get a folder of its name, so the name must be plain; `resolve`, since "." has none.
    if path.suffix != ".toml":
        return Mapping(
            {plain_name(path.resolve().name): RobotData(path, {camera: IMAGES + camera for camera in cameras or ()})}
        )

    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; insula data describe DATA > {path.name} makes one") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise DatasetError(f"{path}: not readable as TOML ({e})") from None

    mapping = parse_mapping(raw, path.parent, str(path))

    # Whoever only measures a data set has no model, and so no cameras to compare with.
    if cameras is None:
        return mapping

    for name, robot in mapping.robots.items():
        for camera in robot.cameras:
            _known(camera, cameras, f"{path}: robots.{name}.cameras", "camera of the model")

    for name, questions in mapping.questions.items():
        if questions.camera is not None:
            _known(questions.camera, cameras, f"{path}: questions.{name}.camera", "camera of the model")

    return mapping


def plain_name(text: str) -> str:
    """Fit to be a name: a checkpoint has a folder of that name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "robot"


def parse_mapping(raw: Any, folder: Path, where: str) -> Mapping:
    """`raw` as read from TOML or JSON; relative paths start at `folder`."""
    table = _table(raw, where)
    for key in table:
        _known(key, ("robots", "questions"), where, "table")

    # Refused and not mended: serving asks for a robot by exactly the name in the file.
    for name in (*_table(table.get("robots", {}), where), *_table(table.get("questions", {}), where)):
        if plain_name(name) != name:
            raise DatasetError(
                f"{where}: {name!r} is no name; use letters, digits, - and _, such as {plain_name(name)!r}"
            )

    robots = {
        name: _robot(_table(entry, f"{where}: robots.{name}"), folder, f"{where}: robots.{name}")
        for name, entry in _table(table.get("robots", {}), where).items()
    }
    questions = {
        name: _build(QuestionData, _table(entry, f"{where}: questions.{name}"), folder, f"{where}: questions.{name}")
        for name, entry in _table(table.get("questions", {}), where).items()
    }
    if not robots:
        raise DatasetError(f"{where}: no [robots.NAME] table; a policy needs at least one robot data set")

    # Mixture, split and log know a source by its name alone, whichever table it came from.
    if twice := robots.keys() & questions.keys():
        raise DatasetError(f"{where}: {sorted(twice)[0]!r} names both a robot and questions; rename one")

    return Mapping(robots, questions)


def mapping_to_json(mapping: Mapping) -> dict[str, Any]:
    """Plain values with absolute paths: `parse_mapping` reads them from anywhere."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            # A run resumes from any folder, with this and not with the file.
            return str(value.resolve())
        if isinstance(value, dict):
            # JSON writes None as null, which no setting takes: left out, it is the default again.
            return {key: plain(entry) for key, entry in value.items() if entry is not None}

        return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(mapping))


def _robot(entry: Table[str, Any], folder: Path, where: str) -> RobotData:
    # Columns first: they are tables inside a list, which no other setting has.
    columns = {key: _columns(entry[key], f"{where}.{key}") for key in ("state", "actions") if key in entry}
    robot: RobotData = _build(RobotData, {**entry, **columns}, folder, where)
    if robot.normalization not in get_args(Kind):
        hint = did_you_mean(str(robot.normalization), get_args(Kind))
        raise DatasetError(f"{where}: normalization is {robot.normalization!r}{hint}, known: {get_args(Kind)}")
    if not robot.actions:
        raise DatasetError(f"{where}: actions is empty; expected at least one column")

    # As text until here: the file's spelling is what a message must quote.
    for loss in robot.losses:
        _known(loss, [name.value for name in LossName], f"{where}.losses", "loss")

    if not robot.losses:
        raise DatasetError(f"{where}: losses is empty, so nothing would be learned; expected 'flow', 'fast' or both")

    for key in robot.units:
        _known(key, ("state", "actions"), f"{where}.units", "entry")

    robot = dataclasses.replace(robot, losses=tuple(LossName(loss) for loss in robot.losses))
    return dataclasses.replace(robot, forms=_forms(robot, where))


def _forms(robot: RobotData, where: str) -> dict[Form, float]:
    """`forms` as they were given, once each of them can be made of this robot's samples."""
    for form, weight in robot.forms.items():
        _known(form, [name.value for name in Form], f"{where}.forms", "form")
        # As for the weight of an entry.
        if type(weight) not in (int, float) or not 0 < weight < LARGEST_WEIGHT:
            raise DatasetError(
                f"{where}.forms.{form} is {weight!r}, expected a number > 0 and < {LARGEST_WEIGHT:g}; or leave the "
                "form out"
            )

    forms = {Form(form): float(weight) for form, weight in robot.forms.items()}
    wanting = [form for form in forms if form.has_subtask]
    if wanting and robot.subtasks is None:
        raise DatasetError(
            f'{where}.forms: {wanting[0]!s} needs subtasks; name what holds them, such as subtasks = "subtask_index"'
        )

    # Also where it is only the default: what a person did not ask for must not be left out in silence.
    if Form.SUBTASK in dataclasses.replace(robot, forms=forms).shares and LossName.FAST not in robot.losses:
        raise DatasetError(
            f"{where}.forms: the form subtask is scored by the loss 'fast' alone, which losses leaves out; write "
            "forms = { actions = 1 }, or losses with 'fast'"
        )

    return forms


_KINDS: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "statistics": (str,),
    "cameras": (dict,),
    # `_columns` has made tuples of these already.
    "state": (tuple,),
    "actions": (tuple,),
    "weight": (int, float),
    "horizon": (int,),
    "delta": (list,),
    "normalization": (str,),
    "instruction": (str,),
    "subtasks": (str,),
    "forms": (dict,),
    "losses": (list,),
    "units": (dict,),
    "camera": (str,),
}
_ITEMS = {"losses": str, "delta": int}


def _build(kind: type, entry: Table[str, Any], folder: Path, where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in entry.items():
        _known(key, fields, where, "setting")
        values[key] = _value(key, value, folder, f"{where}.{key}")

    # After the unknown names: a misspelled "path" is told as such, and not as a missing one.
    for name, f in fields.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in values:
            raise DatasetError(f"{where}: {name!r} is missing{did_you_mean(name, entry)}")

    # Not `<= 0`: TOML knows nan, which is neither.
    if not 0 < values.get("weight", 1.0) < LARGEST_WEIGHT:
        raise DatasetError(
            f"{where}.weight is {values['weight']}, expected a number > 0 and < {LARGEST_WEIGHT:g}; or leave the entry "
            "out"
        )
    if values.get("horizon", 1) < 1:
        raise DatasetError(f"{where}.horizon is {values['horizon']}, expected at least 1 step")

    return kind(**values)


def _value(key: str, value: Any, folder: Path, where: str) -> Any:
    # To Python true is the number 1; in a file it is a slip.
    if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
        expected = " or ".join(k.__name__ for k in _KINDS[key])
        raise DatasetError(f"{where} is {value!r}, expected {expected}")
    if isinstance(value, list) and key in _ITEMS and not all(type(item) is _ITEMS[key] for item in value):
        raise DatasetError(f"{where} is {value!r}, expected a list of {_ITEMS[key].__name__}")
    if isinstance(value, dict) and key != "forms" and not all(isinstance(item, str) for item in value.values()):
        raise DatasetError(f"{where} is {value!r}, expected texts")
    if isinstance(value, str) and (key in ("path", "statistics") or (key == "subtasks" and value.endswith(LINES))):
        # Joined, an absolute path replaces the folder.
        return folder / as_path(value, where).expanduser()

    return tuple(value) if isinstance(value, list) else value


def _columns(value: Any, where: str) -> tuple[Columns, ...]:
    if not isinstance(value, list):
        raise DatasetError(f"{where} is {value!r}, expected a list of columns")

    found = []
    for entry in value:
        raw = {"column": entry} if isinstance(entry, str) else _table(entry, where)
        for key in raw:
            _known(key, ("column", "dims"), where, "setting")

        dims = raw.get("dims")
        if not isinstance(raw.get("column"), str) or not (
            # From 0: numpy would take −1 for the last dimension, and an empty list for a column of none.
            dims is None or (isinstance(dims, list) and dims and all(type(d) is int and d >= 0 for d in dims))
        ):
            raise DatasetError(f'{where}: {entry!r}, expected "COLUMN" or {{column = "COLUMN", dims = [0, 1]}}')

        found.append(Columns(raw["column"], None if dims is None else tuple(dims)))

    return tuple(found)


def _table(value: Any, where: str) -> Table[str, Any]:
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: got {value!r}, expected a table")

    return value


def _known(name: str, known: Any, where: str, what: str) -> None:
    if name not in known:
        names = ", ".join(known)
        raise DatasetError(f"{where}: no {what} {name!r}{did_you_mean(name, known)}; known: {names}")
