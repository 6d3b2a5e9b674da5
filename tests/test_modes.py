"""The modes of a policy: FAST tokens, subtasks, questions. What fails to decode is said, and the caller holds."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_policy import ROBOT, SERVED, observation, policy

from insula.batch import LossName
from insula.cli import execute
from insula.client.plan import Stitching
from insula.data.robot import read_robot
from insula.decode.tokens import Sampling
from insula.errors import DecodeError, InputError, InsulaError, NonFiniteError, ObservationError
from insula.evaluate.command import EvaluateConfig
from insula.evaluate.delayed import Delay, DelayedPolicy
from insula.policy import Policy, command
from insula.policy.modes import Mode, SubtaskPolicy, TokenPolicy
from insula.policy.speaking import Said, Speaker
from insula.tokens.dialects import Form

KNOWN = ("pick up the cup", "put it down", "wait")


@pytest.fixture(scope="module")
def acting() -> Policy:
    return policy()


@pytest.fixture(scope="module")
def subtasks(acting: Policy) -> SubtaskPolicy:
    return SubtaskPolicy(acting, every=4, lag=2, known=KNOWN)


# --- FAST tokens -----------------------------------------------------------------------------------------------------


def test_tokens_become_the_chunk_that_they_spell(acting: Policy) -> None:
    """In the robot's units, relative to the state; whole by the grammar even from random weights."""
    tokens = TokenPolicy(acting)
    rows = [observation(), observation(state=np.array([2.0, 0.5], np.float32))]
    chunks = tokens.act_batch(rows, [(1,), (2,)])
    said = tokens.speaker.say(acting.observe(rows), [(1,), (2,)], tokens.grammar)

    for chunk, one, row in zip(chunks, said, rows, strict=True):
        assert isinstance(chunk, np.ndarray) and chunk.shape == (3, 2)
        spelled = acting.assets.tokenizer.actions_from(one.tokens, 3, 2).actions
        assert spelled is not None
        np.testing.assert_allclose(
            chunk, ROBOT.unnormalize_actions(spelled.astype(np.float32), row["state"]), rtol=1e-6
        )
    np.testing.assert_array_equal(tokens.act(rows[0]), chunks[0])


def test_without_the_grammar_a_failure_is_typed_and_never_zeros(acting: Policy) -> None:
    free = TokenPolicy(acting, bound=False)
    (chunk,) = free.act_batch([observation()], [(1,)])
    assert isinstance(chunk, DecodeError) and "no chunk in these tokens, because" in str(chunk)
    with pytest.raises(DecodeError, match="because"):
        free.act(observation())


def test_a_robot_goes_on_with_its_last_chunk_then_holds() -> None:
    class Failing:
        """A chunk at step 0, and none after it."""

        def act(self, observation: dict[str, Any]) -> np.ndarray:
            raise DecodeError("nothing")

        def act_batch(self, observations: list[Any], seeds: Any) -> list[np.ndarray | InsulaError]:
            made = [np.arange(1.0, 4)[:, None] * [1, 1]]
            return [chunk if seed[-1] == 0 else DecodeError("nothing") for chunk, seed in zip(made, seeds, strict=True)]

    robot = DelayedPolicy(Failing(), Delay(0), 2, np.array([0.0, np.nan]))
    played = [robot.act_batch([{}], [(5, step)])[0].tolist() for step in (0, 2, 4)]
    # Two steps each, and what would follow; its own third step; then it holds.
    assert played == [[[1, 1], [2, 2], [3, 3]], [[3, 3], [0, 3]], [[0, 3], [0, 3]]]
    assert robot.failures == {"nothing": 2}


# --- subtasks --------------------------------------------------------------------------------------------------------


def test_what_is_said_is_what_is_acted_on(acting: Policy, subtasks: SubtaskPolicy) -> None:
    """The chunk is that of the prompt with the subtask, bit for bit; another subtask gives another (the control)."""
    rows, seeds = [observation(), observation(task="lift it")], [(1, 0, 0), (2, 0, 0)]
    chunks = subtasks.act_batch(rows, seeds)
    said = [subtasks.spoken[1, 0][-1].said.text, subtasks.spoken[2, 0][-1].said.text]
    assert set(said) <= set(KNOWN)

    told = acting.act_batch([row | {"subtask": text} for row, text in zip(rows, said, strict=True)], seeds)
    np.testing.assert_array_equal(np.stack(chunks), told)
    others = [next(text for text in KNOWN if text != one) for one in said]
    other = acting.act_batch([row | {"subtask": text} for row, text in zip(rows, others, strict=True)], seeds)
    assert (np.abs(told - other).max(axis=(1, 2)) > 1e-3).all()
    flat = acting.act_batch(rows, seeds)
    assert (np.abs(told - flat).max(axis=(1, 2)) > 1e-3).all()


def test_it_is_said_again_after_so_many_steps_and_used_once_it_was_said(
    subtasks: SubtaskPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """every = 4, lag = 2: at step 4 the next is said, and from step 6 on it is acted on."""
    told: list[str] = []
    count = iter(range(100))

    def think(observations: list[Any], seeds: Any) -> list[Said]:
        return [Said([1], [0.0], True, f"subtask {next(count)}") for _ in seeds]

    def act(observations: list[Any], seeds: Any) -> np.ndarray:
        told.append(observations[0]["subtask"])
        return np.zeros((len(seeds), 3, 2))

    monkeypatch.setattr(subtasks, "think", think)
    monkeypatch.setattr(subtasks.policy, "act_batch", act)
    for step in (0, 2, 4, 6, 8, 10):
        subtasks.act_batch([observation()], [(7, 0, step)])
    assert told == [f"subtask {n}" for n in (0, 0, 0, 1, 1, 2)]
    assert [(one.step, one.since) for one in subtasks.spoken[7, 0]] == [(0, 0), (4, 6), (8, 10)]

    # A new episode of the same name begins anew, and a subtask that is brought is taken as it is.
    subtasks.act_batch([observation()], [(7, 0, 0)])
    subtasks.act_batch([observation(subtask="as I say")], [(7, 0, 2)])
    assert told[-2:] == ["subtask 3", "as I say"] and len(subtasks.spoken[7, 0]) == 1


def test_a_subtask_that_never_ends_is_no_subtask(acting: Policy) -> None:
    """Random weights ramble on: that row alone has no chunk, and its neighbor that was told has one."""
    rambling = SubtaskPolicy(acting)
    lost, told = rambling.act_batch([observation(), observation(subtask="wait")], [(1, 0), (2, 0)])
    assert isinstance(lost, DecodeError) and "the subtask did not end within 40 tokens" in str(lost)
    assert isinstance(told, np.ndarray) and told.shape == (3, 2)
    with pytest.raises(DecodeError, match="did not end"):
        rambling.act(observation())
    with pytest.raises(ObservationError, match="subtask is NoneType, expected a string"):
        acting.act(observation(subtask=None))
    with pytest.raises(ObservationError, match="subtask is ' ', which says nothing"):
        acting.act(observation(subtask=" "))
    for settings, message in (
        ({"every": 0}, "every"),
        ({"lag": -1}, "lag"),
        ({"known": ()}, "no answers"),
        ({"known": ("wait", "wait " * 60)}, "the answer 'wait .*takes .* tokens, the limit is 40"),
    ):
        with pytest.raises(InputError, match=message):
            SubtaskPolicy(acting, **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [("put it down " * 9, "leaves no room: the prompt takes"), ("", "says nothing"), (" \n", "says nothing")],
)
def test_a_subtask_that_cannot_be_acted_on_costs_its_row_alone(
    acting: Policy, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    robot = SubtaskPolicy(acting)
    monkeypatch.setattr(robot, "think", lambda observations, seeds: [Said([1], [0.0], True, text) for _ in seeds])
    lost, told = robot.act_batch([observation(), observation(subtask="wait")], [(1, 0), (2, 0)])
    assert isinstance(lost, DecodeError) and message in str(lost)
    np.testing.assert_array_equal(told, acting.act_batch([observation(subtask="wait")] * 2, [(1, 0), (2, 0)])[1])
    with pytest.raises(DecodeError, match=message):
        robot.act(observation())


def test_known_subtasks_are_written_as_they_were_learned(acting: Policy) -> None:
    """In the words of the dialect: what was learned has blanks where a data set has underscores."""
    robot = SubtaskPolicy(acting, known=("Put_it_down ",))
    (said,) = robot.think([observation()], [(1, 0)])
    assert said.text == acting.assets.tokenizer.dialect.clean("Put_it_down ") != "Put_it_down "


def test_words_have_no_action_tokens_in_them(acting: Policy) -> None:
    tokenizer = acting.assets.tokenizer
    words, wait = Speaker(acting).words, tokenizer.text.encode("wait")
    assert words.accepts([*wait, tokenizer.text.eos_id])
    for token in (tokenizer.fast_ids.start, tokenizer.fast_ids[-1]):
        assert not words.accepts([*wait, token, tokenizer.text.eos_id])


def test_weights_that_are_not_finite_say_nothing(acting: Policy) -> None:
    """A grammar would make a whole chunk of them."""
    broken = jnp.asarray(acting.params.backbone.norm).at[0].set(jnp.nan)
    params = dataclasses.replace(acting.params, backbone=dataclasses.replace(acting.params.backbone, norm=broken))
    lost = Policy(params, acting.assets)
    with pytest.raises(NonFiniteError, match="logits are NaN or infinite; look at the weights"):
        TokenPolicy(lost).act(observation())
    with pytest.raises(NonFiniteError):
        Speaker(lost).ask({}, ["is it there"])


def test_tokens_do_not_go_on_from_a_chunk(acting: Policy) -> None:
    with pytest.raises(InputError, match="cannot go on from the last one"):
        TokenPolicy(acting).act(observation(left=np.zeros((1, 2))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": Mode.TOKENS, "stitching": Stitching.RTC}, "rtc needs flow"),
        ({"subtask_every": 5}, "for --mode subtask"),
        ({"mode": Mode.TOKENS, "subtask_lag": 1}, "for --mode subtask"),
        ({"run": None, "server": "ws://127.0.0.1:1", "seed": 3}, "a server has its own"),
    ],
)
def test_settings_of_an_evaluation_that_would_do_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluateConfig(**({"run": Path("run")} | settings))


def test_the_prompt_that_asks_is_that_of_training(acting: Policy) -> None:
    asked = acting.wonder([observation()])
    assert asked.tokens is not None and asked.token_mask is not None
    ids = asked.tokens[0][asked.token_mask[0]].tolist()
    state = ROBOT.stats["state"].normalize(observation()["state"])
    text = acting.assets.tokenizer.text
    written = acting.assets.tokenizer.dialect.write("put it there", [128, 191], Form.SUBTASK)
    assert written.endswith("Subtask: ") and text.decode(ids).endswith("Subtask: ")
    trained = acting.observer.think("put it there", state, "wait")
    assert ids == trained.tokens[~trained.ar_mask & trained.token_mask].tolist()


@pytest.mark.parametrize(
    ("forms", "act", "message"),
    [
        (
            (Form.FLAT,),
            lambda p: SubtaskPolicy(p).act(observation()),
            "on flat, and this needs subtask; act in",
        ),
        ((Form.FLAT,), lambda p: p.act(observation(subtask="wait")), "this needs actions; leave the subtask out"),
        (
            (Form.SUBTASK, Form.ACTIONS),
            lambda p: p.act(observation()),
            "on subtask, actions, and this needs flat",
        ),
        ((Form.SUBTASK, Form.ACTIONS), lambda p: TokenPolicy(p).act(observation()), "this needs flat; give a subtask"),
    ],
)
def test_a_prompt_that_was_never_trained_is_refused(
    forms: tuple[Form, ...], act: Callable[[Policy], object], message: str, tmp_path: Path
) -> None:
    """By what the checkpoint says of its robot; the controls are those that it was trained on."""
    dataclasses.replace(ROBOT, forms=forms).write(tmp_path)
    robot = read_robot(tmp_path)
    assert robot.forms == forms
    acting = policy(robot=robot)
    with pytest.raises(InputError, match=message):
        act(acting)

    allowed = observation() if Form.FLAT in forms else observation(subtask="wait")
    assert acting.act(allowed).shape == (3, 2)


def test_what_no_loss_has_taught_does_not_act(tmp_path: Path) -> None:
    """An expert without the flow loss, tokens without the token loss; each acts in the other mode."""
    for losses, refused, message in (
        ((LossName.FAST,), lambda p: p.act(observation()), "without the loss flow; act in mode tokens"),
        ((LossName.FLOW,), lambda p: TokenPolicy(p), "without the loss fast; act in mode flow"),
    ):
        dataclasses.replace(ROBOT, losses=losses).write(tmp_path)
        robot = read_robot(tmp_path)
        assert robot.losses == losses
        with pytest.raises(InputError, match=message):
            refused(policy(robot=robot))
    assert policy(robot=robot).act(observation()).shape == (3, 2)
    assert TokenPolicy(policy(robot=dataclasses.replace(robot, losses=tuple(LossName)))).policy.robot.losses


# --- questions -------------------------------------------------------------------------------------------------------


def test_answers_are_bound_or_not(acting: Policy) -> None:
    speaker = Speaker(acting)
    images = {"front": np.full((1, 16, 16, 3), 99, np.uint8)}
    (free,) = speaker.ask(images, ["is it there"])
    assert not free.ended
    with pytest.raises(DecodeError, match="the answer did not end within 40 tokens"):
        free.check("the answer")

    (bound,) = speaker.ask(images, ["is it there"], speaker.choose_from(["yes", "no"]))
    assert bound.check("the answer") in ("yes", "no") and len(bound.log_probs) == len(bound.tokens)

    # An absent camera is masked: what it would have shown changes nothing, and what is shown does.
    both = images | {"wrist": np.full((1, 16, 16, 3), 7, np.uint8)}
    (seen,) = speaker.ask(both, ["is it there"])
    assert seen.log_probs != free.log_probs


def test_a_draw_depends_on_its_seed_alone(acting: Policy) -> None:
    drawing = Speaker(acting, Sampling(2.0))
    seen = acting.observe([observation()] * 3)
    once, again = (drawing.say(seen, [(1, 5), (1, 5), (2, 5)]) for _ in range(2))
    assert once[0].tokens == once[1].tokens == again[0].tokens
    assert once[0].tokens != once[2].tokens


def run_ask(monkeypatch: pytest.MonkeyPatch, acting: Policy, *arguments: str) -> int:
    monkeypatch.setattr(command.Policy, "load", lambda run, step, seed, robot: {None: acting, "arm": acting}[robot])
    return execute(["ask", "run", *arguments])


def test_ask_on_the_command_line(
    acting: Policy, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "seen.png"
    Image.fromarray(np.full((20, 30, 3), 50, np.uint8)).save(picture)
    assert run_ask(monkeypatch, acting, "is it there", "--image", str(picture), "--one-of", "yes", "no") == 0
    said = capsys.readouterr()
    assert said.out.strip() in ("yes", "no") and "probability" in said.err

    where = ["where is it", "--image", f"wrist={picture}", "--places", "2", "--robot", "arm"]
    assert run_ask(monkeypatch, acting, *where) == 0
    assert capsys.readouterr().out.count("<loc") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["is it there"], "the answer did not end within 40 tokens"),
        (["is it " * 40], "the prompt takes"),
        ([" "], "the question is empty"),
        (["is it there", "--image", "nowhere.png"], "nowhere.png: no such file"),
        (["is it there", "--image", "wirst={picture}"], "no camera 'wirst' in this model (did you mean 'wrist'?)"),
        (["is it there", "--image", "{picture}", "{picture}"], "has a picture already"),
        (["is it there", "--image", "{text}"], "unreadable image"),
        (["is it there", "--one-of", "yes", "--places", "2"], "one of --one-of and --places"),
        (["is it there", "--places", "0"], "places"),
        (["is it there", "--temperature", "0"], "temperature"),
        (["is it there", "--one-of", "no", "wait " * 60], "takes"),
    ],
)
def test_bad_questions_are_one_line(
    acting: Policy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    picture, text = tmp_path / "seen.png", tmp_path / "text.png"
    Image.fromarray(np.full((20, 30, 3), 50, np.uint8)).save(picture)
    text.write_text("no picture")
    asked = [argument.format(picture=picture, text=text) for argument in arguments]
    try:
        code = run_ask(monkeypatch, acting, *asked)
    except SystemExit as left:  # what a flag alone shows, before anything is read
        code = int(left.code or 0)
    said = " ".join(capsys.readouterr().err.split())
    assert code in (1, 2)
    assert message in said and "Traceback" not in said


def test_the_model_may_have_more_rows_than_words(acting: Policy) -> None:
    """Of the vocabulary's rows that no token has, none is ever said."""
    size, backbone = acting.assets.tokenizer.vocab_size, acting.params.backbone
    assert size < SERVED.vocab_size
    embedding = jnp.asarray(backbone.embedding).at[size:].mul(50)  # by far the likeliest
    loud = dataclasses.replace(acting.params, backbone=dataclasses.replace(backbone, embedding=embedding))
    (said,) = Speaker(Policy(loud, acting.assets)).say(acting.observe([observation()]), [(0,)])
    assert max(said.tokens) < size
