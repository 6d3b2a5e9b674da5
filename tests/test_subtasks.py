"""Subtasks: read from every place where data sets keep them, written as three forms of a frame, and what each form
teaches. Beside each zero, its control."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import ACTION, CAMERA, FPS, LENGTHS, TASKS, v30
from small import FAR, difference, draws, gradients, largest, loss, replace_observation, transformer, velocity
from subtask_files import (
    CHANGE,
    STEPS,
    add_column,
    entries,
    entry,
    expected,
    lines,
    numbers,
    stretches,
    with_annotations,
    with_index,
)

from insula.data.describe import describe
from insula.data.lerobot import LeRobotDataset
from insula.data.lerobot.conversion import convert_dataset
from insula.data.lerobot.doctor import examine
from insula.data.loader import Loader
from insula.data.mapping import Mapping, RobotData, mapping_to_json, parse_mapping, read_mapping
from insula.data.samples import Samples
from insula.data.subtasks import read_subtasks
from insula.errors import DatasetError, InputError, TokenBudgetError
from insula.inspection.token_columns import ColumnKind, form_of, lay_out_columns
from insula.model.params import abstract_params
from insula.testing import randomize
from insula.tokens import masks
from insula.tokens.dialects import DIALECTS, Form, dialect
from insula.tokens.fast import FASTCodec
from insula.tokens.sequence import FASTTokenizer, Tokenized
from insula.tokens.text import embedded
from insula.train.config import TrainConfig
from insula.train.data import (
    fit_assets,
    held_out_sources,
    moved_mapping,
    open_data,
    training_mixture,
    training_sources,
)
from insula.train.run import train

SMALL = dataclasses.replace(
    mixtures.SMALL, backbone=transformer(16, 2), expert=transformer(12, 2), max_prompt_len=40, max_fast_len=40
)
TASK, STEP = "put the red block in the blue bowl", "reach for the block"
STATE = np.array([-1.0, 0.25, 1.0])
FRAMES = np.arange(sum(LENGTHS))

# --- sequences -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chunks() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, 6, 3)).cumsum(1).clip(-2, 2) / 2


def tokenizer_of(chunks: np.ndarray, name: str = "pi05", **limits: int) -> FASTTokenizer:
    codec = FASTCodec.fit(chunks, vocab_size=400, scale=4)
    return FASTTokenizer(embedded(), codec, name, **{"max_token_len": 96, "max_prompt_len": 48} | limits)


def real(sample: Tokenized) -> list[int]:
    return sample.tokens[sample.token_mask].tolist()


@pytest.mark.parametrize(
    ("name", "pin"), [("pi05", "78d0e12e15ab1d75"), ("pi0", "e11abf42ef00eb2a"), ("pi0_fast", "2028848fb644ad2b")]
)
def test_flat_sequences_are_what_they_were(chunks: np.ndarray, name: str, pin: str) -> None:
    """Pinned before there were other forms: models trained then are served by these bytes."""
    tokenizer, digest = tokenizer_of(chunks, name), hashlib.sha256()
    for state in (STATE, None):
        for chunk in (chunks[0], None):
            sample = tokenizer.tokenize("Put the red_block in\nthe bowl {state}", state, chunk)
            for part in (sample.tokens, sample.token_mask, sample.ar_mask, sample.loss_mask):
                digest.update(part.tobytes())
    assert digest.hexdigest()[:16] == pin


def test_both_new_forms_column_by_column(chunks: np.ndarray) -> None:
    tokenizer = tokenizer_of(chunks)
    text = tokenizer.text
    asked = [text.bos_id, *text.encode(f"Task: {TASK}, State: 0 160 255;\nSubtask: ")]
    answer = [*text.encode(STEP), text.eos_id]
    thought = tokenizer.think(TASK, STATE, STEP)
    assert real(thought) == asked + answer and real(tokenizer.think(TASK, STATE)) == asked
    assert np.flatnonzero(thought.loss_mask).tolist() == list(range(len(asked), len(asked + answer)))
    np.testing.assert_array_equal(thought.ar_mask, thought.loss_mask)

    given = [text.bos_id, *text.encode(f"Task: {TASK}, Subtask: {STEP}, State: 0 160 255;\nAction: ")]
    flat, acted = tokenizer.tokenize(TASK, STATE, chunks[0]), tokenizer.tokenize(TASK, STATE, chunks[0], STEP)
    assert real(acted)[: len(given)] == given == real(tokenizer.tokenize(TASK, STATE, None, STEP))
    for mask in ("ar_mask", "loss_mask"):
        here, there = (sample.tokens[getattr(sample, mask)].tolist() for sample in (acted, flat))
        assert here == there  # the same chunk, the same FAST tokens


@pytest.mark.parametrize("name", list(DIALECTS))
@pytest.mark.parametrize("bins", [[0, 127, 255], None])
def test_every_dialect_tells_the_forms_apart(name: str, bins: list[int] | None) -> None:
    """And finds the state in each of them. What was said is given again in the same words."""
    written = {f: dialect(name).write("A_task", bins, f, "Go_on" if f is Form.ACTIONS else None) for f in Form}
    assert len(set(written.values())) == 3
    for text in written.values():
        span = dialect(name).state_span(text)
        assert (span and text[slice(*span)]) == (bins and "0 127 255")
    said = dialect(name).clean("\nGo_on ")
    assert f"Subtask: {said}" in written[Form.ACTIONS] and said in ("Go on", "go on")
    assert said not in written[Form.SUBTASK] and said not in written[Form.FLAT]


def test_what_does_not_fit_names_its_part(chunks: np.ndarray) -> None:
    tokenizer = tokenizer_of(chunks, max_token_len=60, max_prompt_len=40)
    with pytest.raises(TokenBudgetError, match=r"the subtask takes 31 tokens, the limit is 20; .*max_token_len"):
        tokenizer.think(TASK, STATE, " so" * 30)
    with pytest.raises(TokenBudgetError, match=r"the prompt takes \d+ tokens, the limit is 40; .*max_prompt_len"):
        tokenizer.tokenize(TASK, STATE, chunks[0], " so" * 30)
    assert real(tokenizer.think(TASK, STATE, " so" * 19))


# --- reading ---------------------------------------------------------------------------------------------------------


def read(root: Path, subtasks: str | Path, frames: np.ndarray = FRAMES) -> list[str | None]:
    return read_subtasks(LeRobotDataset(root), RobotData(root, {}, subtasks=subtasks)).of(frames)


def with_texts(root: Path) -> Path:
    """A column of text, null or empty where there is none."""
    v30(root, video=False)
    texts = {frame: text for frame, text in enumerate(expected())}
    first = np.cumsum([0, *LENGTHS])
    rows = lambda e, n: [texts[first[e] + i] if i else texts[first[e]] or "" for i in range(n)]  # noqa: E731
    add_column(root, "step", {"dtype": "string", "shape": [1], "names": None}, rows, pa.string())
    return root


def test_every_place_says_the_same(tmp_path: Path) -> None:
    assert read(with_index(tmp_path / "index"), "subtask_index") == expected()
    assert read(with_annotations(tmp_path / "annotations"), "language_persistent") == expected()
    assert read(with_texts(tmp_path / "texts"), "step") == expected()
    assert read(tmp_path / "texts", lines(tmp_path / "labels.jsonl", *stretches())) == expected()
    assert {None, *STEPS} == set(expected())


def test_whole_numbers_point_into_the_subtasks_or_else_the_tasks(tmp_path: Path) -> None:
    root = with_index(tmp_path / "set", rows=lambda e, n: [-1, *[e % 2] * (n - 1)], name="annotation.step")
    assert read(root, "annotation.step", np.array([0, 1, 8])) == [None, STEPS[0], STEPS[1]]
    (root / "meta" / "subtasks.parquet").unlink()
    assert read(root, "annotation.step", np.array([0, 1, 8])) == [None, *TASKS]
    assert read(root, "task_index", np.array([0, 8])) == list(TASKS)


def test_an_annotation_holds_from_the_nearest_frame_on(tmp_path: Path) -> None:
    for name, off, frame in (("early", 0.04, CHANGE), ("late", 0.06, CHANGE + 1)):
        told = [entry("first", 0.0), entry("then", CHANGE / FPS + off), entry("then", CHANGE / FPS + off)]
        root = with_annotations(tmp_path / name, lambda _, told=told: told)
        found = read(root, "language_persistent")
        assert found[: LENGTHS[0]] == ["first"] * frame + ["then"] * (LENGTHS[0] - frame)


def broken_table(**columns: Any) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        with_index(root)
        pq.write_table(pa.table(columns), root / "meta" / "subtasks.parquet")
        return root

    return make


def without_table(root: Path) -> Path:
    (with_index(root) / "meta" / "subtasks.parquet").unlink()
    return root


def told(*rows: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda root: with_annotations(root, lambda _: list(rows))


def events(root: Path) -> Path:
    kind = pa.list_(pa.struct([pa.field("style", pa.string()), pa.field("content", pa.string())]))
    feature = {"dtype": "language", "shape": [1], "names": None}
    add_column(v30(root, video=False), "language_events", feature, lambda e, n: [[]] * n, kind)
    return root


def changing(root: Path) -> Path:
    return with_annotations(root, rows=lambda e, n: [*[entries(e)] * (n - 1), [] if e == 1 else entries(e)])


WRONG: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "a name": (with_index, "subtask_idx", r"no column 'subtask_idx' .did you mean 'subtask_index'.*in subtask_index"),
    "numbers": (with_index, ACTION, "'action' holds float32 values of shape .3.; subtasks are a column of text"),
    "a camera": (with_index, CAMERA, "holds image values"),
    "no table": (without_table, "subtask_index", r"subtasks\.parquet: missing, .*'subtask_index' mean"),
    "outside": (
        lambda root: with_index(root, rows=lambda e, n: [*numbers(e, n)[:-1], 7 if e == 1 else 0]),
        "subtask_index",
        r"episode 1, frame 11: 'subtask_index' is 7, .*subtasks\.parquet has 0 to 2 .1 such frames",
    ),
    "below": (lambda root: with_index(root, rows=lambda e, n: [-2] * n), "subtask_index", "'subtask_index' is -2"),
    "none at all": (lambda root: with_index(root, rows=lambda e, n: [-1] * n), "subtask_index", "no frame has a subt"),
    "a text": (
        lambda root: with_index(root, (STEPS[0], "None", STEPS[2])),
        "subtask_index",
        "episode 0, frame 3: the subtask in 'subtask_index' is 'None', which stands for a missing text .6 of 24",
    ),
    "null": (broken_table(subtask=["a", None], subtask_index=[0, 1]), "subtask_index", "row 1: 'subtask' is null"),
    "twice": (broken_table(subtask=["a", "b"], subtask_index=[0, 0]), "subtask_index", "subtask_index 0 is both"),
    "a column": (broken_table(subtask=["a"], subtask_idx=[0]), "subtask_index", r"did you mean 'subtask_idx'"),
    "no subtask": (told(entry("a plan", 0.0, "plan")), "language_persistent", "no frame has a subtask"),
    "no content": (told(entry(None, 0.3)), "language_persistent", "the subtask at 0.30 s is null, expected a text"),
    "nan": (told(entry("nan", 0.3)), "language_persistent", 'the subtask at 0.30 s is "nan"'),
    "no time": (told(entry("go", np.nan)), "language_persistent", "episode 0, frame 0: an entry has no time"),
    "two at once": (told(entry("a", 0.2), entry("b", 0.2)), "language_persistent", "two .* at 0.20 s, 'a' and 'b'"),
    "another clock": (told(entry("a", 9.0)), "language_persistent", "'a' begins at 9.00 s, .* ends at 0.60 s"),
    "changing": (changing, "language_persistent", "episode 1, frame 11: holds other annotations"),
    "events": (events, "language_events", r"expected lists of .style, content, timestamp.: no timestamp"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_column_is_named(tmp_path: Path, wrong: str) -> None:
    make, name, message = WRONG[wrong]
    with pytest.raises(DatasetError, match=message):
        read(make(tmp_path / "set"), name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"episode": 7}, r"labels.jsonl, line 2: no episode 7; .* has 0 to 2"),
        ({"start": 2}, r"line 2: overlaps .*labels.jsonl, line 1"),
        ({"stop": 8}, r"line 2: frames 3 to 8 of episode 0; expected start < stop ≤ 7"),
        ({"stop": 3}, "line 2: frames 3 to 3"),
        ({"start": -1}, "line 2: 'start' is -1, expected a whole number from 0 on"),
        ({"stop": 4.5}, "line 2: 'stop' is 4.5"),
        ({"subtask": "none"}, "line 2: the subtask is 'none'"),
        ({"subtask": " "}, "line 2: the subtask is ' '"),
        ({"subtask": 3}, "line 2: 'subtask' is 3, expected a text"),
        ({"subtask": ...}, "line 2: expected an object with episode, start, stop, subtask"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    root = v30(tmp_path / "set", video=False)
    first = {"episode": 0, "start": 0, "stop": 3, "subtask": "go"}
    second = {key: value for key, value in (first | {"start": 3, "stop": 7} | row).items() if value is not ...}
    with pytest.raises(DatasetError, match=message):
        read(root, lines(tmp_path / "labels.jsonl", first, second))
    assert read(root, lines(tmp_path / "labels.jsonl", first), np.array([2, 3])) == ["go", None]
    with pytest.raises(DatasetError, match=r"other\.jsonl: no such file"):
        read(root, tmp_path / "other.jsonl")


def test_the_doctor_says_what_training_would(tmp_path: Path) -> None:
    """A fault where a column is malformed; nothing where it is sound, or merely says nothing."""
    for wrong in ("no table", "a text", "two at once"):
        root = WRONG[wrong][0](tmp_path / wrong)
        (found,) = [finding for finding in examine(root) if finding.fault == "subtasks"]
        assert not found.is_note and found.subject == WRONG[wrong][1]
        with pytest.raises(DatasetError) as error:
            read(root, WRONG[wrong][1])
        assert found.message == str(error.value)
    for sound in (with_index, with_annotations, WRONG["none at all"][0]):
        assert all(finding.is_note for finding in examine(sound(tmp_path / f"sound {sound}")))


def test_describe_offers_them_and_convert_keeps_them(tmp_path: Path) -> None:
    for make, name in ((with_index, "subtask_index"), (with_annotations, "language_persistent")):
        said = describe(make(tmp_path / name), ("front",))
        assert f'# subtasks = "{name}"' in said and f'cannot be read: "{name}"' not in said
        (tmp_path / "data.toml").write_text(said.replace("# subtasks", "subtasks"))
        (robot,) = read_mapping(tmp_path / "data.toml", ("front",)).robots.values()
        assert robot.subtasks == name
    assert "subtasks" not in describe(v30(tmp_path / "none", video=False), ("front",))
    convert_dataset(tmp_path / "subtask_index", tmp_path / "converted")
    assert read(tmp_path / "converted", "subtask_index") == expected()


# --- mapping ---------------------------------------------------------------------------------------------------------


def mapped(extra: str, folder: Path = Path("/data")) -> Mapping:
    robot: dict[str, Any] = {"path": "set", "cameras": {"front": CAMERA}, "weight": 2}
    return parse_mapping({"robots": {"arm": robot | json.loads(extra)}}, folder, "data.toml")


def test_forms_and_their_shares() -> None:
    assert mapped("{}").weights == [2.0] and list(mapped("{}").sources) == ["arm"]
    usual = mapped('{"subtasks": "subtask_index"}')
    assert list(usual.sources) == ["arm:subtask", "arm:actions"] and usual.weights == [0.5, 1.5]
    all_three = mapped('{"subtasks": "labels.jsonl", "forms": {"flat": 1, "actions": 2, "subtask": 1}}')
    assert list(all_three.sources) == ["arm", "arm:actions", "arm:subtask"] and all_three.weights == [0.5, 1.0, 0.5]
    assert all_three.robots["arm"].subtasks == Path("/data/labels.jsonl")
    stored = json.loads(json.dumps(mapping_to_json(all_three)))
    assert parse_mapping(stored, Path("/elsewhere"), "stored") == all_three


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('{"forms": {"actions": 1}}', r'robots.arm.forms: actions needs subtasks; .*subtasks = "subtask_index"'),
        ('{"subtasks": "s", "forms": {"action": 1}}', r"no form 'action' .did you mean 'actions'"),
        ('{"subtasks": "s", "forms": {"actions": 0}}', "forms.actions is 0, expected a number > 0"),
        ('{"subtasks": "s", "forms": {"actions": "1"}}', "forms.actions is '1'"),
        ('{"subtasks": "s", "forms": {"actions": true}}', "forms.actions is True"),
        ('{"subtasks": "s", "forms": ["actions"]}', "forms is .'actions'., expected dict"),
        ('{"subtasks": 3}', "subtasks is 3, expected str"),
        ('{"subtasks": "s", "losses": ["flow"]}', "the form subtask is scored by the loss 'fast' alone"),
        ('{"subtask": "s"}', "no setting 'subtask' .did you mean 'subtasks'"),
    ],
)
def test_forms_that_cannot_be(extra: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        mapped(extra)
    assert mapped('{"subtasks": "s", "losses": ["flow"], "forms": {"actions": 1}}').weights == [2.0]


def test_a_file_of_lines_may_move_with_its_mapping(tmp_path: Path) -> None:
    """As the data set may, while a run goes on; another column is another training."""
    cameras = f'cameras = {{ front = "{CAMERA}" }}'

    def write(name: str, subtasks: str) -> Path:
        (tmp_path / name).mkdir()
        text = f'[robots.arm]\npath = "set"\n{cameras}\nsubtasks = "{subtasks}"\n'
        (tmp_path / name / "data.toml").write_text(text)
        return tmp_path / name / "data.toml"

    stored = read_mapping(write("before", "labels.jsonl"), ("front",))
    moved = moved_mapping(stored, write("after", "labels.jsonl"), ("front",))
    assert moved.robots["arm"].subtasks == tmp_path / "after" / "labels.jsonl"
    with pytest.raises(InputError, match=r"robots\.arm\.subtasks is 'step', the run was started with .*labels\.jsonl"):
        moved_mapping(stored, write("other", "step"), ("front",))


# --- samples ---------------------------------------------------------------------------------------------------------

FORMS = "forms = { flat = 1, subtask = 1, actions = 2 }"


def settings(
    folder: Path, run: Path, extra: str = FORMS, subtasks: str = "subtask_index", **changes: Any
) -> TrainConfig:
    place = folder / f"{run.name}.toml"
    cameras = f'cameras = {{ front = "{CAMERA}" }}'
    place.write_text(f'[robots.arm]\npath = "set"\n{cameras}\nsubtasks = "{subtasks}"\n{extra}\n')
    return mixtures.settings(folder, run, data=place, model=SMALL, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subtasks")
    with_index(folder / "set")
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> SimpleNamespace:
    config = settings(folder, folder / "all", held_out_fraction=0.0)
    data = open_data(config)
    assets = fit_assets(config, data)
    mixture = training_mixture(config, assets, data)
    return SimpleNamespace(config=config, data=data, assets=assets, mixture=mixture, **mixture.sources)


def form(made: SimpleNamespace, name: Form) -> Samples:
    return made.mixture.sources["arm" if name is Form.FLAT else f"arm:{name}"]


def test_each_form_has_its_samples(made: SimpleNamespace) -> None:
    """Two frames have no subtask, and are in `flat` alone; all share the data set and one robot."""
    assert [len(form(made, name)) for name in Form] == [24, 22, 22]
    assert form(made, Form.ACTIONS).unlabeled == 2 and form(made, Form.FLAT).unlabeled == 0
    assert len({id(source.dataset) for source in made.mixture.sources.values()}) == 1
    assert list(made.assets.robots) == ["arm"] and made.mixture.weights == [0.25, 0.25, 0.5]
    labeled = [frame for frame, text in enumerate(expected()) if text is not None]
    assert form(made, Form.SUBTASK).frames.index.tolist() == form(made, Form.ACTIONS).frames.index.tolist() == labeled
    assert form(made, Form.SUBTASK).where(20) == f"data set {made.data.mapping.robots['arm'].path}, episode 2, frame 3"


def test_a_frame_in_each_form(made: SimpleNamespace) -> None:
    tokenizer = made.assets.tokenizer
    rows = np.array([0, 9, 21])  # of episodes 0, 1 and 2
    flat_rows = form(made, Form.SUBTASK).frames.index[rows]
    flat, said, acted = form(made, Form.FLAT).batch(flat_rows), *(form(made, f).batch(rows) for f in list(Form)[1:])
    for at, frame in enumerate(flat_rows.tolist()):
        text = expected()[frame]
        assert text is not None
        said_text = tokenizer.text_from(said.observation.tokens[at][said.loss_mask[at]])
        assert said_text == text
        assert said.observation.tokens[at][said.loss_mask[at]].tolist()[-1] == tokenizer.text.eos_id
        prompt = acted.observation.tokens[at][acted.observation.token_mask[at] & ~acted.ar_mask[at]]
        assert f"Subtask: {text}, State: " in tokenizer.text.decode(prompt)

    np.testing.assert_array_equal(said.loss_mask, said.ar_mask)
    fast = [batch.observation.tokens[batch.loss_mask] for batch in (flat, acted)]
    np.testing.assert_array_equal(*fast)
    assert said.observation.tokens.max() < tokenizer.text.vocab_size <= fast[0].max()  # words, no FAST token
    for batch in (said, acted):
        np.testing.assert_array_equal(batch.observation.state, flat.observation.state)
        np.testing.assert_array_equal(batch.observation.images["front"], flat.observation.images["front"])
    np.testing.assert_array_equal(acted.actions, flat.actions)
    assert said.action_is_pad.all() and not said.action_mask.any()
    np.testing.assert_array_equal(acted.action_is_pad, flat.action_is_pad)


def test_frames_left_out_are_said_once(made: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        training_mixture(made.config, made.assets, made.data)
    (subtask, actions) = [record.message for record in caplog.records if "have no subtask" in record.message]
    assert subtask.endswith("2 of 24 frames have no subtask, and are left out of the form subtask")
    assert actions.endswith("form actions")


def test_workers_and_hosts_draw_the_same(made: SimpleNamespace) -> None:
    mixture = made.mixture
    order = mixture.order(8, 0)
    with Loader(mixture, 8, seed=0, workers=1) as batches:
        for step in range(3):
            made_there, made_here = next(batches), mixture.batch(*order[step])
            jax.tree.map(np.testing.assert_array_equal, made_there, made_here)
    drawn = np.concatenate([order[step][0] for step in range(16)])
    assert np.bincount(drawn).tolist() == [32, 32, 64]


def test_an_overlong_subtask_is_an_error_in_one_line(made: SimpleNamespace, tmp_path: Path) -> None:
    """Also with "drop_token_loss", which would leave nothing to learn of such a sample; the form `actions` keeps its
    prompt."""
    root = with_index(tmp_path / "set", (STEPS[0], "so " * 60, STEPS[2]))
    data = dataclasses.replace(made.data.mapping.robots["arm"], path=root)
    args = (data, made.assets.robots["arm"], made.assets.tokenizer, form(made, Form.FLAT).sizes)
    with pytest.raises(
        DatasetError, match=r"episode 0, frame 3 \(.*\): the subtask takes \d+ tokens, the limit is 40;"
    ):
        Samples(*args, on_overflow="drop_token_loss", form=Form.SUBTASK).tokenize_ahead()
    with pytest.raises(DatasetError, match=r"episode 0, frame 3 .*: the prompt takes \d+ tokens, the limit is 40;"):
        Samples(*args, on_overflow="drop_token_loss", form=Form.ACTIONS).tokenize_ahead()


def test_held_out_frames_are_so_in_every_form(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = settings(folder, folder / "held", held_out_fraction=0.25)
    data = open_data(config)
    assets = fit_assets(config, data)
    drawn, unseen = training_sources(config, assets, data), held_out_sources(config, assets, data)
    assert list(drawn) == list(unseen) == ["arm", "arm:subtask", "arm:actions"]
    held = {frame for source in unseen.values() for frame in source.frames.index.tolist()}
    assert held and not any(held & set(source.frames.index.tolist()) for source in drawn.values())

    # Of an episode without a single subtask nothing is measured, and that is said.
    (episode,) = data.parts["arm"].held_out.tolist()
    told = [row for row in stretches() if row["episode"] != episode]
    lines(folder / "others.jsonl", *told)
    config = settings(folder, folder / "others", subtasks="others.jsonl", held_out_fraction=0.25)
    assert list(held_out_sources(config, assets, open_data(config))) == ["arm"]
    assert "arm:subtask: no episode that is held out has a subtask" in caplog.text


# --- what each form teaches ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(made: SimpleNamespace) -> SimpleNamespace:
    """Parameters without a comfortable zero, and two samples of each form: frames of one episode and another's."""
    rows = np.array([0, 12])
    batches = {name: jax.tree.map(np.asarray, form(made, name).batch(rows)) for name in Form}
    return SimpleNamespace(params=randomize(abstract_params(SMALL), jax.random.key(0)), **batches)


def test_the_expert_reads_the_subtask_it_is_given_and_no_fast_token(
    made: SimpleNamespace, taught: SimpleNamespace
) -> None:
    batch = taught.actions
    noisy, time = draws(SMALL, batch)
    wanted = velocity(taught.params, SMALL, batch, noisy, time)
    tokens = batch.observation.tokens
    fast = replace_observation(batch, tokens=np.where(batch.ar_mask, (tokens + 17) % SMALL.vocab_size, tokens))
    assert difference(velocity(taught.params, SMALL, fast, noisy, time), wanted) == 0.0

    def given(subtask: str) -> Tokenized:
        return made.assets.tokenizer.tokenize(TASK, batch.observation.state[0, :2], batch.actions[0, :, :3], subtask)

    assert expected()[0] == STEPS[0]
    np.testing.assert_array_equal(given(STEPS[0]).tokens, tokens[0])
    swapped, real = np.array(tokens), np.array(batch.observation.token_mask)
    causal = np.array(batch.ar_mask)
    other = given("wait a moment")
    swapped[0], real[0], causal[0] = other.tokens, other.token_mask, other.ar_mask
    changed = dataclasses.replace(replace_observation(batch, tokens=swapped, token_mask=real), ar_mask=causal)
    answer = velocity(taught.params, SMALL, changed, noisy, time)
    assert difference(answer[0], wanted[0]) > FAR and difference(answer[1], wanted[1]) == 0.0


def test_a_subtask_teaches_the_backbone_alone(taught: SimpleNamespace) -> None:
    """No flow loss, and not one bit of its gradient anywhere; the token loss reaches vision and backbone. Control: the
    form `actions`, of the same frames."""
    losses = {name: loss(taught.params, SMALL, getattr(taught, name))[1] for name in (Form.SUBTASK, Form.ACTIONS)}
    assert float(losses[Form.SUBTASK]["flow"]) == 0.0 < float(losses[Form.ACTIONS]["flow"])
    assert float(losses[Form.SUBTASK]["fast"]) > 0

    said, acted = (gradients(taught.params, SMALL, getattr(taught, name)) for name in (Form.SUBTASK, Form.ACTIONS))
    assert largest(said["flow"]) == 0.0 == largest(said["fast"].expert)
    assert largest(said["fast"].backbone) > 0 < largest(said["fast"].vision)
    assert largest(acted["flow"].expert) > 0 == largest(acted["flow"].backbone)

    leaky = SMALL.with_objective(knowledge_insulation=False)
    assert largest(gradients(taught.params, leaky, taught.subtask)["flow"]) == 0.0
    assert largest(gradients(taught.params, leaky, taught.actions)["flow"].backbone) > 0


def test_an_answer_is_causal_and_hidden_from_the_expert(taught: SimpleNamespace) -> None:
    batch = taught.subtask
    real, causal = jnp.asarray(batch.observation.token_mask), jnp.asarray(batch.ar_mask)
    seen = masks.visible_to_expert(real, causal)
    assert causal.any(1).all() and not (seen & causal).any() and (seen == (real & ~causal)).all()
    allowed = np.asarray(masks.make_attn_mask(real, causal))
    for row in range(2):
        answer = np.flatnonzero(causal[row])
        np.testing.assert_array_equal(allowed[row][np.ix_(answer, answer)], np.tri(len(answer), dtype=bool))
        assert not allowed[row][: answer[0], answer].any() and allowed[row][answer, : answer[0]].all()

    noisy, time = draws(SMALL, batch)
    wanted = velocity(taught.params, SMALL, batch, noisy, time)
    tokens = batch.observation.tokens
    other = replace_observation(batch, tokens=np.where(causal, (tokens + 5) % SMALL.vocab_size, tokens))
    assert difference(velocity(taught.params, SMALL, other, noisy, time), wanted) == 0.0
    prompt = replace_observation(batch, tokens=np.where(causal, tokens, (tokens + 5) % SMALL.vocab_size))
    assert difference(velocity(taught.params, SMALL, prompt, noisy, time), wanted) > FAR


def test_actions_of_a_subtask_sample_are_never_looked_at(made: SimpleNamespace, taught: SimpleNamespace) -> None:
    """In a batch with others as well: whatever they are, the flow loss is the same."""
    pair = jax.tree.map(lambda a, b: np.stack([a[0], b[0]]), taught.subtask, taught.actions)
    flow = []
    for row in (None, 0, 1):
        actions = np.array(pair.actions)
        if row is not None:
            actions[row] = 9.0
        batch = dataclasses.replace(pair, actions=actions)
        flow.append(float(loss(taught.params, SMALL, batch)[1]["flow"]))
    assert flow[0] == flow[1] != flow[2]


def test_inspection_tells_words_from_actions(made: SimpleNamespace, taught: SimpleNamespace) -> None:
    for name, kind in ((Form.SUBTASK, ColumnKind.ANSWER), (Form.ACTIONS, ColumnKind.FAST)):
        one = jax.tree.map(lambda leaf: leaf[:1], getattr(taught, name))
        assert form_of(form(made, name)) is name
        seen = lay_out_columns(one, SMALL, made.assets.tokenizer, name)
        assert len(seen.where(kind)) > 1 and len(seen.where(ColumnKind.STATE)) >= 2
        assert not len(seen.where(ColumnKind.FAST)) or name is Form.ACTIONS


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_trains_measures_and_resumes(folder: Path) -> None:
    """Held-out words have no flow loss; after a resume the labels must be those the run was started with."""
    lines(folder / "labels.jsonl", *stretches())
    config = settings(folder, folder / "run", "", subtasks="labels.jsonl", steps=2)
    assert train(config, quiet=True)
    rows = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    (held,) = [row for row in rows if any(key.startswith("held_out") for key in row)]
    assert {key for key in held if key.startswith("held_out")} == {
        *("held_out/arm:subtask/fast", "held_out/arm:subtask/token_accuracy"),
        *(f"held_out/arm:actions/{kind}" for kind in ("flow", "fast", "token_accuracy")),
    }
    assert train(dataclasses.replace(config, steps=3, resume=True), quiet=True)

    lines(folder / "labels.jsonl", *[row | {"subtask": "something else"} for row in stretches()])
    with pytest.raises(DatasetError, match=r"are not those this run was started with .*subtasks"):
        train(dataclasses.replace(config, steps=4, resume=True), quiet=True)
