"""What `insula inspect` says of a sample: each figure against the model's own, each zero beside what is not zero."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import SMALL, write_mixture
from subtask_files import STEPS, subtask_inspector

from insula import losses
from insula.batch import Batch, LossName
from insula.certificate.proof import Outcome, Proof
from insula.certificate.stored import read_certificate
from insula.certificate.table import Scheme
from insula.data.config import DataConfig
from insula.data.lerobot import LeRobotWriter
from insula.data.lerobot.info import Feature, image_feature
from insula.data.samples import Samples
from insula.decode.flow import sample_actions
from insula.errors import DatasetError, InputError, InsulaError
from insula.inspection.command import certify, inspect, run_inspect
from insula.inspection.config import INSPECTED, InspectConfig
from insula.inspection.findings import Findings, Inspector
from insula.inspection.influence import (
    Change,
    ChangeKind,
    Effect,
    Influence,
    judge_influence,
    measure_influence,
)
from insula.inspection.measure import LOOK_TIMES, TIMES, TOP, as_served
from insula.inspection.sample_page import render_sample
from insula.inspection.speech import Speech, Utterance
from insula.inspection.subject import Subject, open_subject
from insula.inspection.token_columns import ColumnKind, form_of, lay_out_columns, read_chunk
from insula.inspection.variants import IS_ON, REASONS, Cell, draw_variants, model_mask
from insula.inspection.view import sample_view
from insula.losses import compute_loss
from insula.model import backbone, insulation
from insula.model.backbone import run_backbone
from insula.model.config import PI05
from insula.model.insulation import insulate
from insula.page import write_page
from insula.policy import Policy
from insula.policy.speaking import Speaker
from insula.tokens import masks
from insula.tokens.dialects import Form
from insula.tokens.fast_grammar import action_grammar
from insula.tokens.grammar import anything
from insula.tokens.sequence import state_bins


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("mixture")) / "data.toml"


@pytest.fixture(scope="module")
def inspector(mixture: Path) -> Inspector:
    """As of a trained model: random weights, every gate open."""
    subject = open_subject(InspectConfig(data=mixture, model=SMALL))
    assert not subject.trained
    return Inspector(dataclasses.replace(subject, trained=True))


def on_device(found: Findings) -> Batch:
    return jax.tree.map(jnp.asarray, found.sample.batch)


@pytest.fixture(scope="module")
def found(inspector: Inspector) -> Findings:
    return inspector.look(3, "arm")


# --- 1. the sequence --------------------------------------------------------------------------------------------------


def test_every_column_is_what_the_model_reads(found: Findings) -> None:
    seen, batch, config = found.seen, on_device(found), found.subject.assets.config
    params = found.subject.params
    assert params is not None
    prefix = run_backbone(params.vision, params.backbone, config, batch.observation, batch.ar_mask)
    assert np.array_equal(seen.token_mask, prefix.token_mask[0]) and np.array_equal(seen.ar_mask, prefix.ar_mask[0])
    memory = insulate(prefix, config.num_memory)
    assert np.array_equal(seen.visible[: config.num_memory], memory.mask[0])
    assert not seen.visible[config.num_memory :].any()
    targets = losses.scored_tokens(batch, config)
    assert targets is not None
    assert (
        np.flatnonzero(seen.loss_mask).tolist()
        == (np.asarray(targets.positions)[0] + 1)[np.asarray(targets.valid)[0]].tolist()
    )
    assert seen.position.tolist() == np.maximum(np.cumsum(seen.token_mask) - 1, 0).tolist()


def test_every_column_has_its_part(found: Findings) -> None:
    seen, tokenizer = found.seen, found.subject.assets.tokenizer
    text = seen.text[SMALL.num_image_tokens :]
    kinds = seen.kind[SMALL.num_image_tokens :]
    assert seen.kind[: SMALL.num_image_tokens] == ["image"] * SMALL.num_image_tokens
    in_order = list(dict.fromkeys(kinds))
    assert in_order == ["BOS", "prompt", "state", "FAST", "end", "EOS", "padding"]
    written = "".join(piece for piece, kind in zip(text, kinds, strict=True) if kind in ("prompt", "state"))
    assert written.startswith("Task: task ") and written.endswith(";\nAction: ")
    bins = "".join(piece for piece, kind in zip(text, kinds, strict=True) if kind == "state")
    state = np.asarray(found.sample.batch.observation.state)[0, :3]
    assert [int(word) for word in bins.split()] == state_bins(state)
    assert text[kinds.index(ColumnKind.STOP)] == "|"
    assert all(token >= tokenizer.text.vocab_size for token in seen.id[seen.where(ColumnKind.FAST)])


def test_an_absent_camera_and_a_short_chunk(inspector: Inspector) -> None:
    """cart has one camera, two action dimensions and four steps of the model's six."""
    found = inspector.look(0, "cart")
    half = SMALL.num_image_tokens // 2
    assert found.seen.kind[: 2 * half] == ["image"] * half + ["absent"] * half
    assert not found.seen.visible[half : 2 * half].any() and not found.seen.token_mask[half : 2 * half].any()
    shown = sample_view(found)
    assert shown["cameras"][1] | {"original": None} == shown["cameras"][1] | {
        "original": None,
        "present": False,
        "png": None,
    }
    assert np.shape(shown["chunk"]["actions"]) == (4, 2)
    error = shown["losses"]["error"]
    assert error["steps"] == [1, 1, 1, 1, 0, 0] and error["dims"] == [1, 1, 0, 0]
    assert {row[4] for row in error["by_step"]} == {0.0} and min(row[0] for row in error["by_step"]) > 0
    assert "absent camera wrist" in [row["label"] for row in shown["influence"]["rows"]] and shown["outcome"] == "holds"


def test_a_question_has_no_chunk(inspector: Inspector) -> None:
    found = inspector.look(0, "scenes")
    kinds = list(dict.fromkeys(found.seen.kind[SMALL.num_image_tokens :]))
    assert kinds == ["BOS", "prompt", "answer", "EOS", "padding"]
    assert "".join(found.seen.text).startswith("<bos>how bright is picture ")
    shown = sample_view(found)
    assert shown["chunk"] is None and shown["attention"]["actions"] == 0 and shown["losses"]["error"] is None
    assert shown["outcome"] == "not asked" and shown["faults"] == [] and shown["look"] is False
    assert [(column["loss"], column["scheme"]) for column in shown["gradients"]["columns"]] == [
        ("fast", "insulated"),
        ("fast", "joint"),
        ("fast", "frozen"),
    ]
    assert shown["losses"]["flow"] == 0 < shown["losses"]["fast"] == shown["losses"]["total"]


def test_the_chunk_is_read_back(found: Findings) -> None:
    source = found.sample.source
    seen = read_chunk(found.sample.batch, source.robot, found.seen, found.subject.assets.tokenizer)  # type: ignore[attr-defined]
    assert seen.decoded is not None and seen.actions.shape == seen.decoded.shape == (6, 3)
    assert 0 < np.abs(seen.decoded - seen.actions).max() < 0.5  # rounded by a quarter of a unit, times √(2/6)
    carried = [n for start, stop in seen.spans.values() for n in range(start, stop)]
    assert sorted(set(carried)) == list(range(18))
    assert list(seen.spans) == found.seen.where(ColumnKind.FAST).tolist()


def test_a_chunk_without_tokens_says_why(mixture: Path) -> None:
    short = dataclasses.replace(SMALL, max_fast_len=3)
    subject = open_subject(InspectConfig(data=mixture, model=short, tokens_only=True))
    shown = sample_view(Inspector(subject).look(0, "arm"))["chunk"]
    assert shown["decoded"] is None and re.search(
        r"because the action takes \d+ tokens, the limit is 3", shown["invalid"]
    )


# --- 2. attention -----------------------------------------------------------------------------------------------------

PICTURE = """
 i i p f f · a a
i■ ■ ■ b b . x x
i■ ■ ■ b b . x x
p■ ■ ■ b b . x x
f▲ ▲ ▲ c f . x x
f▲ ▲ ▲ c c . x x
·. . . . . . x x
a○ ○ ○ h h . ● ●
a○ ○ ○ h h . ● ●
"""
DRAWN = {
    "■": Cell.BLOCK,
    "b": Cell.BLIND,
    ".": Cell.PADDING,
    "x": Cell.APART,
    "▲": Cell.READS,
    "c": Cell.PAST,
    "f": Cell.FUTURE,
    "○": Cell.INSULATED,
    "h": Cell.HIDDEN,
    "●": Cell.CHUNK,
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """Two images of one patch, a word, two FAST tokens, padding; two actions."""
    config = dataclasses.replace(
        SMALL, vision=dataclasses.replace(SMALL.vision, image_size=16), max_prompt_len=2, max_fast_len=2
    )
    token_mask, ar_mask = np.array([1, 1, 1, 1, 1, 0], bool), np.array([0, 0, 0, 1, 1, 0], bool)
    return {variant.name: variant.cells for variant in draw_variants(config, token_mask, ar_mask, 2)}


def test_reasons_are_those_of_the_picture(drawn: dict[str, np.ndarray]) -> None:
    rows = [line[1:].split() for line in PICTURE.strip("\n").splitlines()[1:]]
    assert drawn["insulated"].tolist() == [[DRAWN[cell] for cell in row] for row in rows]


def test_the_drawn_mask_is_the_models_own(found: Findings) -> None:
    seen, batch, config = found.seen, on_device(found), found.subject.assets.config
    (ours, *_) = draw_variants(config, seen.token_mask, seen.ar_mask, config.horizon)
    params = found.subject.params
    assert params is not None
    prefix = run_backbone(params.vision, params.backbone, config, batch.observation, batch.ar_mask)
    size = len(seen.id)
    mask = IS_ON[ours.cells]
    assert np.array_equal(mask[:size, :size], masks.make_attn_mask(prefix.token_mask, prefix.ar_mask)[0])
    memory = insulate(prefix, config.num_memory).mask[0]
    assert all(np.array_equal(row[: config.num_memory], memory) for row in mask[size:, :size])
    assert not mask[size:, config.num_memory : size].any() and not mask[:size, size:].any() and mask[size:, size:].all()
    assert mask.any() and not mask.all()


def test_a_state_token_sees_no_action() -> None:
    config = dataclasses.replace(SMALL, state_input="token")
    real = np.arange(config.num_image_tokens + config.max_token_len) < config.num_memory
    mask = model_mask(config, real, np.zeros_like(real), 1 + config.horizon)[len(real) :, len(real) :]
    assert mask[0].tolist() == [True] + [False] * config.horizon and mask[1:].all()
    assert draw_variants(config, real, np.zeros_like(real), 1 + config.horizon)  # and the reasons agree


def test_other_masks_differ_where_they_say(drawn: dict[str, np.ndarray]) -> None:
    ours = IS_ON[drawn["insulated"]]
    assert np.array_equal(IS_ON[drawn["joint"]], ours) and (drawn["joint"] == Cell.JOINT).sum() == 6
    hybrid = IS_ON[drawn["HybridVLA-like"]] ^ ours
    assert np.argwhere(hybrid).tolist() == [[q, k] for q in (3, 4) for k in (6, 7)]  # FAST reads the noisy actions
    leaky = IS_ON[drawn["leaky"]] ^ ours
    opened = [[q, k] for q in (0, 1, 2) for k in (3, 4)] + [[3, 4]] + [[q, k] for q in (6, 7) for k in (3, 4)]
    assert np.argwhere(leaky).tolist() == opened
    assert all(REASONS[Cell(cell)].leak for cell in drawn["leaky"][leaky])


# --- 3. losses --------------------------------------------------------------------------------------------------------


def test_token_scores_are_the_loss(found: Findings) -> None:
    params, config, batch = found.subject.params, found.subject.assets.config, on_device(found)
    assert found.measured is not None
    _, metrics = compute_loss(params, config, batch, jax.random.key(0))
    scores = found.measured.tokens
    valid = scores.valid
    assert scores.loss[valid].mean() == pytest.approx(float(metrics["fast"]), rel=1e-4)
    np.testing.assert_allclose(np.exp(-scores.loss[valid]), scores.probability[valid], rtol=1e-5)
    assert np.flatnonzero(found.seen.loss_mask).tolist() == scores.column[valid].tolist()
    assert scores.likelihood.shape[1] == TOP and (np.diff(scores.likelihood, axis=1) <= 0).all()
    right = scores.likeliest[:, 0] == found.seen.id[scores.column]
    assert right[valid].mean() == pytest.approx(float(metrics["token_accuracy"]), abs=1e-6)


def test_flow_scores_are_the_loss(found: Findings) -> None:
    params, batch = found.subject.params, on_device(found)
    assert found.measured is not None and params is not None
    many = found.subject.assets.config.with_objective(flow_samples=64)
    _, metrics = compute_loss(params, many, batch, jax.random.key(0))
    flow = found.measured.flow
    assert float(flow.loss) == pytest.approx(float(metrics["flow"]), rel=1e-4)
    real = np.asarray(batch.action_mask)[0]
    assert flow.error.shape == (len(TIMES), *real.shape)
    assert (flow.error[:, ~real] == 0).all() and (flow.error[:, real] > 0).all()
    shown = sample_view(found)["losses"]
    assert shown["total"] == pytest.approx(shown["flow"] + shown["weight"] * shown["fast"], rel=1e-4)


def test_the_policys_chunk_is_what_it_would_serve(found: Findings, inspector: Inspector) -> None:
    """From the prompt alone, tokenized without actions: the FAST tokens of the sample are not there to be read."""
    subject, batch = found.subject, on_device(found)
    config, params = subject.assets.config, subject.params
    assert params is not None and found.measured is not None
    state = np.asarray(batch.observation.state)[0, :3]
    task = re.fullmatch(r"<bos>Task: (.*), State: .*", "".join(found.seen.text), re.DOTALL)
    assert task
    served = subject.assets.tokenizer.tokenize(task[1], state)
    width = config.max_prompt_len
    observation = dataclasses.replace(
        batch.observation,
        tokens=jnp.asarray(served.tokens[None, :width]),
        token_mask=jnp.asarray(served.token_mask[None, :width]),
    )
    real = np.zeros((config.horizon, config.action_dim), bool)
    real[:, :3] = True
    noise = jax.random.normal(jax.random.key(0), (8, config.horizon, config.action_dim))[:1]
    np.testing.assert_allclose(
        found.measured.flow.chunk, sample_actions(params, config, observation, noise, real=real)[0], atol=1e-4
    )


# --- 4. what the backbone says, and the other sequences of a frame ----------------------------------------------------


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    return subtask_inspector(tmp_path_factory.mktemp("frames"))


@pytest.fixture(scope="module")
def frame(frames: Inspector) -> Findings:
    """Frame 8 of the data set, which episode 1 begins with "reach for the block"."""
    return frames.look(8, "arm:subtask")


def written(found: Findings, *kinds: ColumnKind) -> str:
    return "".join(found.seen.text[column] for column in found.seen.where(*kinds))


def test_every_sequence_of_the_frame_is_beside_it(frames: Inspector, frame: Findings) -> None:
    names = ["arm:subtask", "arm", "arm:actions"]
    assert [one.sample.name for one in frame.sequences] == names
    assert [form_of(one.sample.source) for one in frame.sequences] == [Form.SUBTASK, Form.FLAT, Form.ACTIONS]
    assert len({one.sample.where for one in frame.sequences}) == 1 and frame.sample.where.endswith("episode 1, frame 1")
    subtask, flat, actions = frame.sequences
    assert written(subtask, ColumnKind.ANSWER) == STEPS[0] and STEPS[0] not in written(flat, ColumnKind.PROMPT)
    assert f"Subtask: {STEPS[0]}" in written(actions, ColumnKind.PROMPT)
    assert written(flat, ColumnKind.FAST) == written(actions, ColumnKind.FAST) != ""

    # Numbers differ once a frame was left out: the same frame is not the same row.
    last = frames.look(21, "arm:actions")
    assert {one.sample.name: one.sample.number for one in last.sequences} == {
        "arm:actions": 21,
        "arm:subtask": 21,
        "arm": 23,
    }
    assert frames.subject.first == "arm" and frames.look(3, "arm").others


def test_a_frame_without_a_subtask_says_so(frames: Inspector, frame: Findings, inspector: Inspector) -> None:
    bare = frames.look(19, "arm")  # the first frame of episode 2
    assert bare.others == [] and sample_view(bare)["lacks_subtask"]
    assert not sample_view(frame)["lacks_subtask"]
    assert not sample_view(inspector.look(3, "arm"))["lacks_subtask"]  # a robot that never had any


def test_each_sequence_has_its_own_masks_and_losses(frame: Findings) -> None:
    params, config = frame.subject.params, frame.subject.assets.config
    shown = sample_view(frame)
    for one, view in zip(frame.sequences, (shown, *shown["others"]), strict=True):
        _, metrics = compute_loss(params, config, on_device(one), jax.random.key(0))
        assert view["losses"]["fast"] == pytest.approx(float(metrics["fast"]), rel=1e-4)
        assert len(view["losses"]["tokens"]) == view["about"]["scored"] == int(metrics["scored_tokens"])
        masks_shown = [[token[name] for token in view["tokens"]] for name in ("token_mask", "ar_mask", "loss_mask")]
        observation, batch = one.sample.batch.observation, one.sample.batch
        assert masks_shown == [mask[0].tolist() for mask in (observation.token_mask, batch.ar_mask, batch.loss_mask)]
        assert (view["losses"]["flow"] > 0) == (view["chunk"] is not None) == (view["about"]["source"] != "arm:subtask")
    assert len({view["losses"]["fast"] for view in (shown, *shown["others"])}) == 3
    assert shown["outcome"] == "not asked" and shown["about"]["title"] == "task → subtask"


def likeliest_tokens(said: Utterance, vocab_size: int) -> list[int]:
    """In each place; this model has rows that are no token, and with random weights they are as likely as others."""
    rows = said.scores.likeliest[said.scores.valid]
    return [next(i for i in row.tolist() if i < vocab_size) for row in rows]


def test_what_is_said_is_what_the_policy_says(frames: Inspector, frame: Findings) -> None:
    """Token by token as `Speaker` decodes it, which has a cache; and greedy, so each is the likeliest in its place."""
    speaker = Speaker(Policy(frames.subject.params, frames.subject.assets))
    tokenizer = frames.subject.assets.tokenizer
    for one in frame.sequences:
        source, served = one.sample.source, as_served(one.sample.batch, frames.subject.assets.config)
        words = source.form is Form.SUBTASK  # type: ignore[attr-defined]
        stop = tokenizer.text.eos_id if words else tokenizer.stop_id
        assert one.speech is not None and (one.speech.bound is None) == words
        free = one.speech.free
        (said,) = speaker.say(served, [(0,)], anything(tokenizer.vocab_size, stop))
        assert (said.tokens, said.ended) == (free.tokens, free.ended) and len(said.tokens) > 1
        valid = free.scores.valid
        np.testing.assert_allclose(np.log(free.scores.probability[valid]), said.log_probs, atol=1e-4)
        assert likeliest_tokens(free, tokenizer.vocab_size) == free.tokens

        if one.speech.bound is not None:
            bound = one.speech.bound
            grammar = action_grammar(tokenizer, source.robot.horizon, source.robot.action_dim)  # type: ignore[attr-defined]
            assert bound.ended and grammar.accepts(bound.tokens) and not grammar.accepts(free.tokens)
            assert bound.chunk and bound.chunk.actions is not None and bound.chunk.actions.shape == (6, 3)
            # The control of "the likeliest": a grammar takes others.
            assert likeliest_tokens(bound, tokenizer.vocab_size) != bound.tokens


def test_what_was_said_is_shown_beside_what_is_true(frame: Findings) -> None:
    shown = sample_view(frame)
    said = shown["speech"]
    assert said["truth"] == STEPS[0] and said["free"]["text"] != STEPS[0] and not said["right"]
    assert said["bound"] is said["common"] is None and said["free"]["chunk"] is said["free"]["invalid"] is None
    assert frame.speech is not None
    tokens = said["free"]["tokens"]
    assert [token["id"] for token in tokens] == frame.speech.free.tokens
    own = [next(other for other in token["top"] if other["id"] == token["id"]) for token in tokens]
    assert [other["probability"] for other in own] == [token["probability"] for token in tokens]

    acted = shown["others"][1]["speech"]
    assert acted["truth"] is None and acted["free"]["chunk"] is None and acted["free"]["invalid"].startswith("because ")
    recorded = np.asarray(frame.sample.batch.actions)[0, :6, :3]
    chunk = np.array(acted["bound"]["chunk"])
    assert acted["bound"]["error"] == pytest.approx(np.sqrt(np.mean((chunk - recorded) ** 2)), rel=1e-3)
    free, bound = ([token["id"] for token in acted[way]["tokens"]] for way in ("free", "bound"))
    n = acted["common"]
    assert not acted["alike"] and free[:n] == bound[:n] and free[n : n + 1] != bound[n : n + 1]


def test_a_backbone_that_knows_the_answer_is_right(frame: Findings) -> None:
    """The control of "not right": the sample's own tokens, as if they had been said, with and without their end."""
    assert frame.speech is not None and frame.measured is not None
    own = frame.seen.id[frame.seen.loss_mask].tolist()
    scores = frame.measured.tokens
    knowing = Utterance(own, True, scores, None)
    shown = sample_view(dataclasses.replace(frame, speech=Speech(knowing)))["speech"]
    assert shown["right"] and shown["free"]["text"] == shown["truth"] == STEPS[0]
    cut = sample_view(dataclasses.replace(frame, speech=Speech(dataclasses.replace(knowing, ended=False))))["speech"]
    assert not cut["right"]


def test_a_sample_that_says_its_own_chunk_is_alike(frames: Inspector, frame: Findings) -> None:
    """What is free and whole already is the same within the grammar."""
    actions = frame.others[1]
    assert actions.measured is not None and actions.speech is not None
    own, robot = actions.seen.id[actions.seen.loss_mask].tolist(), actions.sample.source.robot  # type: ignore[attr-defined]
    chunk = frames.subject.assets.tokenizer.actions_from(own, robot.horizon, robot.action_dim)
    knowing = Utterance(own, True, actions.measured.tokens, chunk)
    shown = sample_view(dataclasses.replace(actions, speech=Speech(knowing, knowing)))["speech"]
    assert shown["alike"] and shown["common"] == len(own)
    # Rounding alone is between them.
    assert 0 < shown["free"]["error"] < 0.3 and shown["free"]["invalid"] is None


def test_an_answer_to_a_question_is_said(inspector: Inspector) -> None:
    shown = sample_view(inspector.look(3, "scenes"))
    assert shown["others"] == [] and shown["speech"]["truth"] == "60 of 255" and len(shown["speech"]["free"]["tokens"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"params": None}, "the model was not run"),
        ({"trained": False}, "random weights have learned to say nothing; needs a trained model: --run RUN"),
    ],
)
def test_who_has_nothing_to_say_says_why(inspector: Inspector, changes: dict, reason: str) -> None:
    silent = Inspector(dataclasses.replace(inspector.subject, **changes))
    silent._prove, silent._measure, silent._forward = inspector._prove, inspector._measure, inspector._forward
    assert sample_view(silent.look(3, "arm"))["speech"] == {"missing": reason}
    assert sample_view(inspector.look(3, "arm"))["speech"]["free"]["tokens"]  # the control


def test_a_robot_of_the_flow_loss_alone_and_a_codec_without_every_byte(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspector.subject.sources["arm"]
    assert isinstance(source, Samples)
    with monkeypatch.context() as patched:
        patched.setattr(source, "data", dataclasses.replace(source.data, losses=(LossName.FLOW,)))
        shown = sample_view(inspector.look(3, "arm"))["speech"]
        assert "this robot learns from the flow loss alone" in shown["missing"]

    def cannot(*_: object) -> None:
        raise InputError("this FAST codec cannot spell every chunk")

    monkeypatch.setattr("insula.inspection.speech.action_grammar", cannot)
    silent = Inspector(inspector.subject)
    speech = silent._listener.hear(inspector.subject.params, inspector.subject.sample(3, "arm"))
    assert speech.bound is None and speech.unbound == "this FAST codec cannot spell every chunk" and speech.free.tokens


def test_a_fault_in_the_masks_of_another_sequence_is_one(frame: Findings) -> None:
    (ours, *rest) = frame.others[1].drawn
    first = int(frame.others[1].seen.where(ColumnKind.FAST)[0])
    cells = ours.cells.copy()
    cells[0, first] = Cell.UNLIKE  # an image reads a FAST token
    broken = dataclasses.replace(frame.others[1], drawn=[dataclasses.replace(ours, cells=cells), *rest])
    faulty = dataclasses.replace(frame, others=[frame.others[0], broken])
    assert frame.faults == [] and faulty.outcome == "leaks"
    assert faulty.faults[0].startswith("attention of arm:actions: 1 cells are not as they must be, first (0, ")


# --- 5. gradients, and what moves what --------------------------------------------------------------------------------


def test_what_moves_what(found: Findings) -> None:
    assert found.influence is not None and found.influence.outcome == "holds"
    table = found.influence.table
    one_token = table[Change(ChangeKind.ANSWER_ONE)]
    assert one_token[Effect.BEFORE] == 0 < (one_token[Effect.AFTER] or 0)
    for kind in (ChangeKind.ANSWER_ALL, ChangeKind.ANSWER_NONE, ChangeKind.ANSWER_ONE, ChangeKind.PADDING):
        assert table[Change(kind)][Effect.VELOCITY] == table[Change(kind)][Effect.PREFIX] == 0
    cameras = [Change(ChangeKind.CAMERA, name) for name in ("front", "wrist")]
    for change in (*cameras, Change(ChangeKind.PROMPT_TOKEN)):
        assert min(v for v in table[change].values() if v is not None) > 0
    noisy = table[Change(ChangeKind.NOISY_ACTIONS)]
    assert noisy[Effect.VELOCITY] and not noisy[Effect.PREFIX]


def entry(kind: ChangeKind, effect: Effect, value: float) -> dict[Change, dict[Effect, float | None]]:
    """One entry, beside a camera that moves the velocity."""
    return {Change(ChangeKind.CAMERA, "front"): {Effect.VELOCITY: 1.0}, Change(kind): {effect: value}}


@pytest.mark.parametrize(
    ("kind", "effect", "value", "outcome"),
    [
        (ChangeKind.ANSWER_ALL, Effect.VELOCITY, 0.0, Outcome.HOLDS),
        (ChangeKind.ANSWER_ALL, Effect.VELOCITY, 1e-30, Outcome.LEAKS),
        (ChangeKind.ANSWER_NONE, Effect.PREFIX, 1.0, Outcome.LEAKS),
        (ChangeKind.ANSWER_ONE, Effect.BEFORE, 1.0, Outcome.LEAKS),
        (ChangeKind.ANSWER_ONE, Effect.AFTER, 1.0, Outcome.HOLDS),
        (ChangeKind.ANSWER_ONE, Effect.AFTER, 0.0, Outcome.VACUOUS),
        (ChangeKind.ABSENT_CAMERA, Effect.AFTER, 1.0, Outcome.LEAKS),
        (ChangeKind.PADDING, Effect.VELOCITY, 1.0, Outcome.LEAKS),
        (ChangeKind.NOISY_ACTIONS, Effect.PREFIX, 1.0, Outcome.LEAKS),
        (ChangeKind.NOISY_ACTIONS, Effect.VELOCITY, 0.0, Outcome.VACUOUS),
        (ChangeKind.NOISY_ACTIONS, Effect.VELOCITY, float("nan"), Outcome.NOT_FINITE),
        (ChangeKind.PROMPT_TOKEN, Effect.PREFIX, 0.0, Outcome.HOLDS),
    ],
)
def test_every_entry_is_judged(kind: ChangeKind, effect: Effect, value: float, outcome: Outcome) -> None:
    found, findings = judge_influence(entry(kind, effect, value))
    assert found is outcome and len(findings) == (outcome is not Outcome.HOLDS)
    assert all(kind in finding and effect in finding for finding in findings)


def test_numbers_that_are_not_finite_are_on_the_page(found: Findings) -> None:
    """JSON has no NaN, so a page that wrote them as they are could not be drawn."""
    nan = float("nan")
    assert found.proof is not None and found.influence is not None
    table = {part: {loss: dict.fromkeys(Scheme, nan) for loss in LossName} for part in found.proof.table}
    proof = Proof(table, Outcome.NOT_FINITE, ("all of it",))
    moved = {Change(ChangeKind.PADDING): {Effect.VELOCITY: nan, Effect.BEFORE: None}}
    broken = dataclasses.replace(found, proof=proof, influence=Influence(moved, Outcome.NOT_FINITE, ()))
    shown = sample_view(broken)
    assert shown["gradients"]["table"]["vision"]["flow"]["insulated"] is None
    assert shown["influence"]["rows"][0]["moved"] == {"velocity": None}  # and nothing of what was not measured
    assert "NaN" not in json.dumps(shown, allow_nan=False) and render_sample(broken)


def every_block_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAST tokens attended bidirectionally."""
    rule = masks.make_attn_mask
    monkeypatch.setattr(backbone.masks, "make_attn_mask", lambda real, ar: rule(real, jnp.zeros_like(ar)))


def the_answer_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAST tokens visible to the expert."""
    insulate = insulation.insulate

    def leaky(prefix: backbone.BackboneOutput, columns: int, scale: float = 0.0) -> insulation.Memory:
        memory = insulate(prefix, columns, scale)
        return dataclasses.replace(memory, mask=prefix.token_mask[:, :columns])

    for place in ("insula.inspection.influence", "insula.inspection.measure", "insula.losses"):
        monkeypatch.setattr(f"{place}.insulate", leaky)


def no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Insulation that stops nothing."""
    insulate = losses.insulate
    monkeypatch.setattr(losses, "insulate", lambda prefix, columns, scale: insulate(prefix, columns, 1.0))


@pytest.mark.parametrize(
    ("leak", "findings"),
    [
        (
            every_block_at_once,
            [
                "changing one token of the answer moves the answer before it by",
                "cells are not as they must be, first (0, ",
            ],
        ),
        pytest.param(
            *(the_answer_in_sight, ["changing all tokens of the answer moves velocity by"]), marks=pytest.mark.slow
        ),
        (no_stop, ["flow loss reaches backbone layer 0, norm"]),
    ],
)
def test_a_leaky_model_names_the_path_and_exits_with_1(
    leak: Callable,
    findings: list[str],
    mixture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    leak(monkeypatch)
    config = InspectConfig(data=mixture, model=SMALL, out=tmp_path / "page.html", certificate=tmp_path / "c.json")
    code = run_inspect(config)
    printed = capsys.readouterr().out
    assert code == 1 and "insulation: leaks" in printed
    assert read_certificate(tmp_path / "c.json")["outcome"] == "leaks"
    page = (tmp_path / "page.html").read_text()
    assert all(finding in printed and finding in page for finding in findings)


def test_a_model_without_insulation_is_no_pass(mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    joint = SMALL.with_objective(knowledge_insulation=False)
    config = InspectConfig(data=mixture, model=joint, out=tmp_path / "page.html", certificate=tmp_path / "c.json")
    assert not inspect(config)
    finding = "knowledge_insulation is off, γ is 1: the flow loss reaches vision, norm "
    assert "insulation: off" in (printed := capsys.readouterr().out) and finding in printed
    written = read_certificate(tmp_path / "c.json")
    assert written["outcome"] == "off" and written["findings"][0].startswith(finding)
    assert '"own":"joint"' in (tmp_path / "page.html").read_text()


def test_a_closed_gate_shows_nothing(inspector: Inspector) -> None:
    """An untrained expert does not read at all: no zero of it may count."""
    subject = inspector.subject
    params = subject.params
    assert params is not None
    zero = jax.tree.map(jnp.zeros_like, params.expert.layers.attention_norm)
    layers = dataclasses.replace(params.expert.layers, attention_norm=zero, mlp_norm=zero)
    closed = dataclasses.replace(params, expert=dataclasses.replace(params.expert, layers=layers))
    inspector.subject = dataclasses.replace(subject, params=closed)
    try:
        found = inspector.look(3, "arm")
    finally:
        inspector.subject = subject
    assert found.outcome == "vacuous" and found.influence is not None
    assert "no camera and no prompt moves the velocity" in " ".join(found.influence.findings)


def test_what_a_sample_lacks_is_no_zero(inspector: Inspector, found: Findings) -> None:
    """Without an answer there is nothing that could stay as it is."""
    batch, answer = found.sample.batch, np.asarray(masks.is_suffix(found.seen.ar_mask))[SMALL.num_image_tokens :]
    observation = dataclasses.replace(batch.observation, token_mask=batch.observation.token_mask & ~answer)
    asked = dataclasses.replace(batch, observation=observation, ar_mask=batch.ar_mask & ~answer)
    params, tokenizer = inspector.subject.params, inspector.subject.assets.tokenizer
    assert params is not None
    seen = lay_out_columns(asked, SMALL, tokenizer, Form.FLAT)
    measured = measure_influence(inspector._forward, params, SMALL, asked, seen, jax.random.key(0))
    assert measured.outcome == "holds" and not any("answer" in change.kind for change in measured.table)
    assert {row[Effect.AFTER] for row in measured.table.values()} == {None}
    assert found.influence is not None and found.influence.table[Change(ChangeKind.PADDING)][Effect.AFTER] == 0


def test_the_certificate_holds_both(found: Findings, tmp_path: Path) -> None:
    certify(found, tmp_path / "c.json")
    written = read_certificate(tmp_path / "c.json")
    assert written["outcome"] == "holds" and written["findings"] == [] and written["parameters"] == "trained"
    table = written["table"]
    assert table["backbone layer 0"]["flow"]["embeddings"] > 0 == table["vision"]["flow"]["embeddings"]
    assert table["action head"]["flow"]["insulated"] > 0 == table["action head"]["fast"]["insulated"]
    velocity = {(row["kind"], row["camera"]): row["moved"]["velocity"] for row in written["influence"]}
    assert velocity["all tokens of the answer", None] == 0 < velocity["camera", "front"]


# --- 6. where the expert looks ----------------------------------------------------------------------------------------


def test_looks_are_shares_of_what_is_visible(found: Findings) -> None:
    assert found.measured is not None
    look, config = found.measured.look, found.subject.assets.config
    memory = config.num_memory
    assert look.shape == (len(LOOK_TIMES), 1, 2, memory + config.horizon)
    np.testing.assert_allclose(look.sum(-1), 1, rtol=1e-5)
    visible = found.seen.visible[:memory]
    assert (look[..., :memory][..., ~visible] == 0).all() and (look[..., :memory][..., visible] > 0).all()
    assert np.abs(look[0] - look[-1]).max() > 0  # noise and data are not looked at alike


# --- the page and the command -----------------------------------------------------------------------------------------


def test_the_page_is_one_offline_file_and_no_text_runs(found: Findings) -> None:
    evil = "</script><script>alert(1)</script>"
    sample = dataclasses.replace(found.sample, where=evil)
    page = render_sample(dataclasses.replace(found, sample=sample), {evil: 3})
    assert evil not in page and page.count("<script>") == page.count("</script>") - 1 == 10  # one holds the data
    assert not re.search(r"<(link|img|iframe)|@import|url\(", page)
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= {"https://github.com/leeoniya/uPlot"}  # in a comment
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data and json.loads(data[1])["about"]["sample"] == evil
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy and "default-src 'none'" in policy[1] and policy[1].count("'sha256-") == 10


def test_tokens_only_needs_no_memory_for_the_model(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = dataclasses.replace(PI05, cameras=SMALL.cameras)
    with pytest.raises(ValueError, match=r"'pi05' \(1\d\.\d GiB of float32 parameters\) takes about .*--tokens-only"):
        open_subject(InspectConfig(data=mixture, model=model))
    page = tmp_path / "page.html"
    reading = DataConfig(fast_last_id=257_023)
    config = InspectConfig(data=mixture, model=model, reading=reading, tokens_only=True, out=page)
    assert inspect(config) and page.stat().st_size < 3_000_000
    assert "the model was not run" in page.read_text()
    with pytest.raises(ValueError, match="--certificate goes without --tokens-only"):
        inspect(dataclasses.replace(config, certificate=tmp_path / "c.json"))


def test_outputs_are_checked_before_anything_is_loaded(mixture: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("insula.inspection.command.open_subject", lambda _: pytest.fail("loaded already"))
    page, proof = tmp_path / "page.html", tmp_path / "c.json"
    (tmp_path / "settings.json").write_text('{"run": "r"}')
    (tmp_path / "taken").write_text("a file, not a folder")
    for changes, message in (
        ({"out": tmp_path / "page.pdf"}, r"--out .*page.pdf: ending '.pdf', expected one of .html"),
        ({"out": tmp_path}, r"--out .*: ending '', expected one of .html"),
        ({"out": tmp_path / "taken" / "page.html"}, r"--out .*page.html: cannot be written"),
        ({"certificate": tmp_path / "c.yaml"}, r"--certificate .*c.yaml: ending '.yaml', expected one of .json"),
        ({"certificate": tmp_path / "settings.json"}, r"settings.json: is there and is no certificate; name a new"),
        ({"certificate": tmp_path / "taken" / "c.json"}, r"--certificate .*c.json: cannot be written"),
        ({"serve": True, "port": 65536, "out": None}, r"port is 65536, expected an integer from 0 to 65535"),
    ):
        with pytest.raises(InsulaError, match=message):
            inspect(dataclasses.replace(InspectConfig(data=mixture, model=SMALL, out=page), **changes))
    assert (tmp_path / "settings.json").read_text() == '{"run": "r"}' and not page.exists() and not proof.exists()
    with pytest.raises(pytest.fail.Exception, match="loaded already"):  # the control
        inspect(InspectConfig(data=mixture, model=SMALL, out=page, certificate=proof))
    with pytest.raises(pytest.fail.Exception, match="loaded already"):
        inspect(InspectConfig(run=tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()  # no folder is made for the page of a run that is not there


def test_what_a_user_can_mend(mixture: Path, found: Findings, tmp_path: Path) -> None:
    subject: Subject = found.subject
    with pytest.raises(ValueError, match=r"sample 9999 of 'arm' does not exist; it has 0 to"):
        subject.sample(9999, "arm")
    with pytest.raises(ValueError, match="sample -1"):
        subject.sample(-1)
    with pytest.raises(ValueError, match=r"no source 'amr'.*did you mean 'arm'"):
        subject.sample(0, "amr")
    with pytest.raises(FileNotFoundError, match=r"no train.json here; expected what `insula train --run`"):
        open_subject(InspectConfig(run=tmp_path))
    with pytest.raises(DatasetError, match="nowhere"):
        open_subject(InspectConfig(data=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="give either --run RUN, or --data DATA"):
        open_subject(InspectConfig(run=tmp_path, data=mixture))
    with pytest.raises(ValueError, match="--fast-last-id goes without --run"):
        open_subject(InspectConfig(run=tmp_path, reading=dataclasses.replace(INSPECTED, fast_last_id=1)))
    with pytest.raises(ValueError, match="--preset or --model goes without --run"):
        open_subject(InspectConfig(run=tmp_path, model=SMALL))
    with pytest.raises(ValueError, match="--training goes with --run"):
        open_subject(InspectConfig(data=mixture, training=True))
    with pytest.raises(ValueError, match="--out goes without --serve"):
        open_subject(InspectConfig(run=tmp_path, serve=True, out=tmp_path / "page.html"))
    with pytest.raises(ValueError, match="--port goes with --serve"):
        open_subject(InspectConfig(run=tmp_path, port=1))
    with pytest.raises(OSError, match="a folder; name a file in it"):
        write_page(tmp_path, "page")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no train\.json here; there is one in .*run; expected"):
        open_subject(InspectConfig(run=tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a":', "train.json: not JSON"),
        ("[]", "train.json: holds a JSON list, expected an object"),
        ("{}", "train.json: no 'run', 'model'; found nothing"),
        ('{"run": "r", "model": 3, "optimizer": {}}', "train.json: model: got 3, expected an object"),
    ],
)
def test_a_damaged_run_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_subject(InspectConfig(run=tmp_path))


def test_a_question_certifies_nothing(inspector: Inspector, tmp_path: Path) -> None:
    found = inspector.look(0, "scenes")
    assert form_of(found.sample.source) is None and found.faults == []
    with pytest.raises(ValueError, match=r"questions.jsonl.*has no action, so it cannot show where gradients go"):
        certify(found, tmp_path / "c.json")


def test_data_without_actions_says_so(tmp_path: Path) -> None:
    cameras = {f"observation.images.{name}": image_feature(32, 32) for name in SMALL.cameras}
    with LeRobotWriter(tmp_path / "still", 10, cameras | {"observation.state": Feature("float32", (3,))}) as writer:
        pictures = {name: np.zeros((5, 32, 32, 3), np.uint8) for name in cameras}
        writer.add_episode(pictures | {"observation.state": np.zeros((5, 3), np.float32)}, "wait")
    with pytest.raises(DatasetError, match="'action'"):
        open_subject(InspectConfig(data=tmp_path / "still", model=SMALL))
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "questions.jsonl").write_text('{"question": "how many", "answer": "two"}\n')
    (tmp_path / "data.toml").write_text('[questions.q]\npath = "q"\ncamera = "front"\n')
    with pytest.raises(DatasetError, match="robot"):
        open_subject(InspectConfig(data=tmp_path / "data.toml", model=SMALL))


def test_columns_need_no_model(found: Findings) -> None:
    subject = dataclasses.replace(found.subject, params=None)
    bare = Inspector(subject).look(3, "arm")
    assert bare.proof is bare.influence is bare.measured is None and bare.outcome == "not asked"
    again = lay_out_columns(found.sample.batch, subject.assets.config, subject.assets.tokenizer, Form.FLAT)
    assert again.kind == bare.seen.kind == found.seen.kind
