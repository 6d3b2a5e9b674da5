"""Three forms of a frame with a subtask: their sequences, their samples, and what each teaches. Beside each zero, its
control."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
from lerobot_files import CAMERA
from small import FAR, difference, draws, gradients, largest, loss, replace_observation, transformer, velocity
from subtask_files import STEPS, expected, lines, stretches, with_index

from insula.data.loader import Loader
from insula.data.samples import Samples
from insula.errors import DatasetError, TokenBudgetError
from insula.inspection.token_columns import ColumnKind, form_of, lay_out_columns
from insula.model.params import abstract_params
from insula.testing import randomize
from insula.tokens import masks
from insula.tokens.dialects import DIALECTS, Form, dialect
from insula.tokens.fast import FASTCodec
from insula.tokens.sequence import FASTTokenizer, Tokenized
from insula.tokens.text import embedded
from insula.train.config import TrainConfig
from insula.train.data import fit_assets, held_out_sources, open_data, training_mixture, training_sources
from insula.train.run import train

SMALL = dataclasses.replace(
    mixtures.SMALL, backbone=transformer(16, 2), expert=transformer(12, 2), max_prompt_len=40, max_fast_len=40
)
TASK, STEP = "put the red block in the blue bowl", "reach for the block"
STATE = np.array([-1.0, 0.25, 1.0])

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
