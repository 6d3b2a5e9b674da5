"""Real-time chunking: guidance of any model, and the clean prefix of one that is trained for it. t = 1 is noise."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import (
    CLOSE,
    FAR,
    SMALL,
    VARIANTS,
    by_leaf,
    difference,
    draws,
    gradients,
    jit,
    largest,
    loss,
    model,
    mostly_slow,
    prefix,
    velocity,
)
from small_policy import observation, policy

from insula import flow, losses
from insula.batch import Observation, Previous
from insula.certificate.gradients import prove
from insula.certificate.proof import Outcome
from insula.decode.flow import sample_actions
from insula.decode.realtime import MAX_GUIDANCE, guidance_weight, guide, keep, soft_mask
from insula.errors import InputError
from insula.losses import compute_loss, draw, expert_loss, flow_matching_loss, masked_mean
from insula.model.attention import attend_with_memory
from insula.model.config import ModelConfig, config_from_dict
from insula.model.expert import run_expert
from insula.model.insulation import insulate

MODELS: dict[str, ModelConfig] = {name: dataclasses.replace(SMALL, **fields) for name, fields in VARIANTS.items()}
MODELS["state token, adaRMS"] = dataclasses.replace(SMALL, state_input="token")
TRAINED = SMALL.with_objective(rtc_max_delay=2)
H, D = SMALL.horizon, SMALL.action_dim


def previous(delay: list[int], length: list[int], seed: int = 11) -> Previous:
    actions = jax.random.normal(jax.random.key(seed), (len(delay), H, D))
    left = flow.first_steps(jnp.array(length), H)[..., None]
    return Previous(jnp.where(left, actions, 0.0), jnp.array(delay), jnp.array(length))


def noise(rows: int, seed: int = 5) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, H, D))


def sample(config: ModelConfig, rows: int = 2, steps: int = 10, real: np.ndarray | None = None) -> Any:
    """A compiled function of noise and what is left of the last chunk."""
    params, _ = model(config, batch_size=rows)
    run = jit(lambda seen, noise, left: sample_actions(params, config, seen, noise, steps, real, left))
    return partial(run, served(config, rows))


def served(config: ModelConfig, rows: int) -> Observation:
    """The batch's observations as a policy reads them: without FAST tokens."""
    _, batch = model(config, batch_size=rows)
    seen, width = batch.observation, config.max_prompt_len
    token_mask = (seen.token_mask & ~batch.ar_mask)[:, :width]
    return dataclasses.replace(seen, tokens=seen.tokens[:, :width], token_mask=token_mask)


# --- guidance --------------------------------------------------------------------------------------------------------


def test_the_soft_mask_in_numbers() -> None:
    """c = (n − i) / (n − d + 1) and c (e^c − 1) / (e − 1), by hand: 0.4875 of 3/4, 0.1888 of 1/2, 0.0413 of 1/4."""
    delay, length = jnp.array([2, 0, 3, 0, 1]), jnp.array([5, 1, 3, 0, 2])
    wanted = [
        [1, 1, 0.487549, 0.188771, 0.041324, 0],
        [0.188771, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 0.188771, 0, 0, 0, 0],
    ]
    assert np.allclose(soft_mask(delay, length, 6), wanted, atol=2e-6)


def test_the_weight_is_the_papers_and_clipped() -> None:
    time = np.array([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], np.float32)
    assert np.allclose(guidance_weight(jnp.asarray(time)), [5, 5, 10 / 3, 2, 10 / 3, 5, 5])
    for most in (MAX_GUIDANCE, 100.0):
        tau = 1 - time[1:-1]
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        assert np.allclose(guidance_weight(jnp.asarray(time[1:-1]), most), np.minimum(most, (1 - tau) / (tau * r2)))
    assert guidance_weight(jnp.array([0.1]), 100.0)[0] > MAX_GUIDANCE  # the control: it was the bound


def test_guidance_is_the_gradient_of_what_it_says() -> None:
    """Against `jax.grad` of ½ Σ W (Y − x̂)², and against the paper's own form, in its time, with the whole Jacobian."""
    left = previous([1, 2], [3, 4])
    x, time = noise(2, seed=1), jnp.array([0.3, 0.8])
    mix = jax.random.normal(jax.random.key(2), (H * D, H * D)) / 3

    def u(x: jax.Array, time: jax.Array) -> jax.Array:
        return jnp.tanh(x.reshape(len(x), -1) @ mix + time[:, None]).reshape(x.shape)

    weight = soft_mask(left.delay, left.length, H)[..., None]
    found = guide(u, left)(x, time)

    def objective(x: jax.Array) -> jax.Array:
        return jnp.sum(weight * jnp.square(left.actions - (x - time[:, None, None] * u(x, time)))) / 2

    pull = guidance_weight(time)[:, None, None] * jax.grad(objective)(x)
    assert difference(found, u(x, time) + pull) < 1e-5 and largest(pull) > FAR

    real = np.zeros((H, D), bool)
    real[:3, :2] = True
    masked = guide(u, left, real)(x, time)
    weight, whole = weight * real[None], weight
    wanted = u(x, time) + real[None] * guidance_weight(time)[:, None, None] * jax.grad(objective)(x)
    assert difference(masked, wanted) < 1e-5 and difference(masked * real[None], found * real[None]) > FAR
    weight = whole

    for row, tau in enumerate(1 - np.asarray(time)):

        def predicted(a: jax.Array, row: int = row, tau: float = tau) -> jax.Array:
            v = -u(a.reshape(1, H, D), jnp.array([1 - tau]))
            return a + (1 - tau) * v.reshape(-1)

        a = x[row].reshape(-1)
        error = (left.actions[row].reshape(-1) - predicted(a)) * jnp.broadcast_to(weight[row], (H, D)).reshape(-1)
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        v = -u(x[row : row + 1], jnp.array([1 - tau])).reshape(-1)
        guided = v + min(5, (1 - tau) / (tau * r2)) * error @ jax.jacobian(predicted)(a)
        assert difference(found[row].reshape(-1), -guided) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_guidance_pulls_to_the_last_chunk(name: str) -> None:
    """The steps of the delay most, those behind what is left not. A row with nothing left is as without guidance."""
    run = sample(MODELS[name])
    plain = run(noise(2), None)
    target = run(noise(2, seed=6), None)  # a chunk that this model makes
    left = Previous(target, jnp.array([2, 0]), jnp.array([3, 0]))
    guided = run(noise(2), left)
    before, after = (np.abs(np.asarray(chunk - target))[0, :2].mean() for chunk in (plain, guided))
    assert after < 0.35 * before and before > 0.1
    assert difference(guided[1], plain[1]) < CLOSE < FAR < difference(guided[0], plain[0])  # of two programs


def test_rows_are_guided_each_for_itself() -> None:
    run, left = sample(SMALL, rows=4), previous([0, 1, 2, 0], [4, 2, 4, 0])
    whole = run(noise(4), left)
    order = jnp.array([2, 0, 3, 1])
    params, _ = model(SMALL, batch_size=4)
    for rows in (jnp.array([2]), order):
        seen, x, part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (served(SMALL, 4), noise(4), left))
        some = jit(lambda seen, x, part: sample_actions(params, SMALL, seen, x, 10, None, part))(seen, x, part)
        assert difference(some, whole[rows]) < CLOSE
    assert difference(run(noise(4), jax.tree.map(lambda leaf: leaf[order], left)), whole) > FAR


@pytest.mark.parametrize("config", [SMALL, TRAINED], ids=["guided", "trained"])
def test_what_is_no_part_of_the_last_chunk_changes_nothing(config: ModelConfig) -> None:
    """Values this robot lacks go straight to 0, and neither they nor steps with nothing left are pulled to."""
    real = np.zeros((H, D), bool)
    real[:3, :2] = True
    run = sample(config, real=real)
    left = previous([1, 2], [2, 2])
    left = dataclasses.replace(left, actions=jnp.where(real[None], left.actions, 0.0))
    chunk = run(noise(2), left)
    assert np.abs(np.asarray(chunk)[:, ~real]).max() < 1e-5 < np.abs(np.asarray(chunk)[:, real]).min()

    behind = dataclasses.replace(left, actions=left.actions.at[:, 2:].add(3.0))
    assert difference(run(noise(2), behind), chunk) == 0.0
    assert difference(run(noise(2), dataclasses.replace(left, actions=left.actions.at[:, :1].add(3.0))), chunk) > FAR
    if config is SMALL:
        beside = dataclasses.replace(left, actions=left.actions.at[:, :, 2:].add(3.0))
        assert difference(run(noise(2), beside), chunk) == 0.0


# --- a clean prefix: sampling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_given_steps_stay_as_they_are(name: str) -> None:
    """And the rest goes on from them. A row without any is as in plain sampling."""
    config = MODELS[name].with_objective(rtc_max_delay=2)
    run, left = sample(config), previous([2, 0], [3, 0])
    plain, kept = run(noise(2), None), run(noise(2), left)
    assert difference(kept[0, :2], left.actions[0, :2]) == 0.0 < difference(plain[0, :2], left.actions[0, :2])
    assert difference(kept[1], plain[1]) < (0.1 if config.compute.dtype == "bfloat16" else CLOSE)
    assert difference(kept[0, 2:], plain[0, 2:]) > FAR

    other = dataclasses.replace(left, actions=left.actions.at[:, 1].add(1.0))
    assert difference(run(noise(2), other)[0, 2:], kept[0, 2:]) > FAR


def test_the_expert_is_asked_at_the_right_times() -> None:
    """0 at the steps that are given, and the step's own time at the others."""
    left = previous([1, 2], [3, 4])
    seen = []

    def watch(x: jax.Array, time: jax.Array) -> jax.Array:
        seen.append((x, time))
        return jnp.ones_like(x)

    u, start = keep(watch, noise(2), left)
    moved = u(start + 7.0, jnp.array([0.5, 0.75]))
    ((x, time),) = seen
    assert np.array_equal(time, [[0, 0.5, 0.5, 0.5], [0, 0, 0.75, 0.75]])
    for row, delay in enumerate((1, 2)):
        for held in (start, x):
            assert np.array_equal(held[row, :delay], left.actions[row, :delay])
        assert np.array_equal(start[row, delay:], noise(2)[row, delay:])
        assert np.all(moved[row, :delay] == 0) and np.all(moved[row, delay:] == 1)


@pytest.mark.parametrize("name", mostly_slow(MODELS, "grouped queries", "state token, adaRMS"))
def test_one_time_for_all_steps_is_a_time_for_each(name: str) -> None:
    config = MODELS[name]
    params, batch = model(config)
    noisy, time = draws(config, batch, 3)
    each = jnp.repeat(time[..., None], H, axis=-1)
    whole = velocity(params, config, batch, noisy, time)
    tolerance = 0.05 if config.compute.dtype == "bfloat16" else CLOSE
    assert difference(velocity(params, config, batch, noisy, each), whole) < tolerance
    assert difference(velocity(params, config, batch, noisy, each.at[:, :, 0].set(0.0)), whole) > FAR


def test_the_state_is_at_the_time_of_the_noisy_steps() -> None:
    """Its keys in every layer are those of a chunk noisy all over. Control: those of the given steps are not."""
    config = MODELS["state token, adaRMS"]
    params, batch = model(config)
    noisy, time = draws(config, batch)
    memory = insulate(prefix(params, config, batch), config.num_memory)
    known = flow.first_steps(jnp.array([[1], [2]]), H)
    held = flow.hold(noisy, time, batch.actions[:, None], known)

    @jit
    def keys(noisy: jax.Array, time: jax.Array) -> list[jax.Array]:
        seen: list[jax.Array] = []

        def attend(q: jax.Array, k: jax.Array, *others: Any) -> jax.Array:
            seen.append(k)
            return attend_with_memory(q, k, *others)

        run_expert(params.expert, config, memory, batch.observation.state, noisy, time, attend)
        return seen

    for with_delay, without in zip(keys(*held), keys(noisy, time), strict=True):
        assert difference(with_delay[:, :, 0], without[:, :, 0]) < CLOSE
        assert difference(with_delay[:, :, 1], without[:, :, 1]) > FAR


@pytest.mark.parametrize("name", mostly_slow(MODELS, "grouped queries", "state token, adaRMS"))
def test_serving_sees_what_training_saw(name: str) -> None:
    """One Euler step over all of the time moves by the velocity of training at t = 1, with FAST tokens behind the
    prompt. Control: at t = 1 for the given steps, too."""
    config = MODELS[name].with_objective(rtc_max_delay=2).with_compute(dtype="float32")
    params, batch = model(config)
    left = previous([2, 1], [3, 3])
    known = flow.first_steps(left.delay, H)
    noisy, times = flow.hold(noise(2), jnp.ones(2), left.actions, known)
    trained, wrong = (velocity(params, config, batch, noisy[:, None], t[:, None]) for t in (times, jnp.ones((2, H))))
    moved = noisy - sample(config, steps=1)(noise(2), left)
    free = np.asarray(~known[..., None])
    assert difference(moved * free, trained[:, 0] * free) < CLOSE < FAR < difference(wrong * free[:, None], trained)
    assert largest(moved * ~free) == 0.0


# --- a clean prefix: training ----------------------------------------------------------------------------------------


def former_loss(expert: Any, config: ModelConfig, memory: Any, batch: Any, rng: jax.Array) -> jax.Array:
    """`draw` and `expert_loss` as they were before there were delays, word for word."""
    time_rng, noise_rng = jax.random.split(rng)
    draws = (batch.actions.shape[0], config.objective.flow_samples)
    time = flow.sample_time(time_rng, draws)
    noise = jax.random.normal(noise_rng, (*draws, *batch.actions.shape[1:]))
    actions = batch.actions[:, None]
    action_mask = batch.action_mask[:, None]
    noisy = flow.add_noise(actions, noise, time)
    velocity = run_expert(expert, config, memory, batch.observation.state, noisy, time)
    error = flow_matching_loss(velocity, flow.target_velocity(actions, noise), action_mask)
    return masked_mean(error, action_mask)


def drawn_loss(expert: Any, config: ModelConfig, memory: Any, batch: Any, rng: jax.Array) -> jax.Array:
    return expert_loss(expert, config, memory, batch, draw(config, batch.actions.shape[0], rng))


def expert_gradients(config: ModelConfig, of: Any = drawn_loss) -> tuple[jax.Array, Any]:
    params, batch = model(config)
    memory = insulate(prefix(params, config, batch), config.num_memory)
    run = jit(lambda expert: jax.value_and_grad(lambda e: of(e, config, memory, batch, jax.random.key(7)))(expert))
    return run(params.expert)


def with_delays(monkeypatch: pytest.MonkeyPatch, delays: list[list[int]]) -> None:
    monkeypatch.setattr(flow, "sample_delay", lambda *args: jnp.array(delays))


@pytest.mark.parametrize("name", mostly_slow(MODELS, "grouped queries", "state token, adaRMS"))
def test_without_delays_nothing_has_changed(name: str) -> None:
    """To the last bit. Control: with delays it is another loss."""
    config = MODELS[name]
    assert config.objective.rtc_max_delay == 0
    before = expert_gradients(config, former_loss)
    assert difference(expert_gradients(config), before) == 0.0 < largest(before)
    assert difference(expert_gradients(config.with_objective(rtc_max_delay=2))[0], before[0]) > 1e-4


@pytest.mark.parametrize("name", mostly_slow(MODELS, "grouped queries", "state token, adaRMS"))
def test_a_delay_of_zero_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same times and noise, so the same loss and gradients."""
    config = MODELS[name].with_compute(dtype="float32")
    plain = expert_gradients(config)
    samples = config.objective.flow_samples
    on = config.with_objective(rtc_max_delay=2)
    with monkeypatch.context() as patch:
        with_delays(patch, [[0] * samples] * 2)
        value, gradient = expert_gradients(on)
    assert abs(float(value - plain[0])) < CLOSE and difference(gradient, plain[1]) < CLOSE * largest(plain[1])
    with_delays(monkeypatch, [[1] * samples] * 2)
    assert difference(expert_gradients(on)[1], plain[1]) > FAR * largest(plain[1])


def test_only_steps_after_the_delay_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the velocity every real value after the delay has a gradient and no other; the mean is over these."""
    config = TRAINED.with_objective(flow_samples=2)
    params, batch = model(config)
    memory = insulate(prefix(params, config, batch), config.num_memory)
    delays = [[0, 2], [1, 2]]
    with_delays(monkeypatch, delays)
    inputs: list[Any] = []

    def of(v: jax.Array) -> jax.Array:
        def run(*args: Any) -> jax.Array:
            inputs.append(args[-2:])
            return v

        monkeypatch.setattr(losses, "run_expert", run)
        return drawn_loss(params.expert, config, memory, batch, jax.random.key(7))

    v = jax.random.normal(jax.random.key(1), (2, 2, H, D))
    value, gradient = jax.value_and_grad(of)(v)
    scored = np.asarray(batch.action_mask)[:, None] & (np.arange(H)[:, None] >= np.array(delays)[..., None, None])
    assert np.array_equal(np.asarray(gradient) != 0, scored) and not scored.all()

    (noisy, times) = inputs[0]
    time_rng, noise_rng = jax.random.split(jax.random.key(7))
    time, drawn = flow.sample_time(time_rng, (2, 2)), jax.random.normal(noise_rng, v.shape)
    error = np.square(np.asarray(v - (drawn - batch.actions[:, None])))
    assert float(value) == pytest.approx(float(error[scored].mean()), rel=1e-5)
    for row in range(2):
        for k, delay in enumerate(delays[row]):
            assert np.array_equal(noisy[row, k, :delay], batch.actions[row, :delay])
            assert np.all(times[row, k, :delay] == 0) and np.all(times[row, k, delay:] == time[row, k])
            t = np.asarray(time)[row, k]
            free = t * drawn[row, k] + (1 - t) * batch.actions[row]
            assert np.allclose(noisy[row, k, delay:], free[delay:], atol=1e-6)


def test_a_delay_as_long_as_what_is_real_scores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a chunk starts on an episode's last step."""
    _, batch = model(TRAINED)
    short = dataclasses.replace(batch, action_is_pad=jnp.broadcast_to(jnp.arange(H) >= 2, (2, H)))
    for delay in (2, 1):
        with_delays(monkeypatch, [[delay]] * 2)
        params, _ = model(TRAINED)
        total = jit(lambda p: compute_loss(p, TRAINED, short, jax.random.key(7))[1]["flow"])(params)
        assert (float(total) == 0.0) == (delay == 2) and np.isfinite(total)


def test_delays_are_drawn_evenly_for_each_draw() -> None:
    config = TRAINED.with_objective(flow_samples=300)
    params, batch = model(config)
    memory = insulate(prefix(params, config, batch), config.num_memory)
    seen: list[Any] = []

    def run(*args: Any) -> jax.Array:
        seen.append(args[-1])
        return jnp.zeros_like(args[-2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "run_expert", run)
        drawn_loss(params.expert, config, memory, batch, jax.random.key(7))
    delays = np.sum(np.asarray(seen[0]) == 0, axis=-1)
    counts = np.bincount(delays.ravel(), minlength=4)
    assert counts[3] == 0 and counts[:3].min() > 150 and not np.array_equal(delays[0], delays[1])


@pytest.mark.parametrize("name", mostly_slow((name for name in MODELS if "scan" not in name), "state token, adaRMS"))
def test_the_flow_loss_stays_insulated(name: str) -> None:
    """Exactly zero on vision and backbone, with delays as without; un-insulated, it reaches both. The token loss is
    not touched."""
    config = MODELS[name].with_objective(rtc_max_delay=2)
    params, batch = model(config)
    found, plain = (gradients(params, c, batch) for c in (config, MODELS[name]))
    assert largest(found["flow"].vision) == largest(found["flow"].backbone) == 0.0
    assert all(np.any(leaf != 0) for leaf in by_leaf(found["flow"].expert).values())
    assert difference(found["fast"], plain["fast"]) < 1e-5 < FAR < difference(found["flow"], plain["flow"])
    fast, unchanged = (loss(params, c, batch)[1]["fast"] for c in (config, MODELS[name]))
    assert float(fast) == float(unchanged)

    leak = gradients(params, config.with_objective(knowledge_insulation=False), batch)["flow"]
    assert largest(leak.vision) > 0 and largest(leak.backbone) > 0


def test_the_certificate_holds_with_delays() -> None:
    params, batch = model(TRAINED)
    assert prove(params, TRAINED, batch, jax.random.key(0)).outcome is Outcome.HOLDS  # beside its own control


def test_a_delay_leaves_a_step_to_learn() -> None:
    for wrong, message in ((H, "rtc_max_delay is 4, expected less than the horizon, 4"), (-1, "≥ 0"), (True, "True")):
        with pytest.raises(InputError, match=message):
            SMALL.with_objective(rtc_max_delay=wrong)
    written = dataclasses.asdict(SMALL)
    del written["objective"]["rtc_max_delay"]  # as versions before it wrote
    assert config_from_dict(written) == SMALL
    assert config_from_dict(dataclasses.asdict(TRAINED)) == TRAINED


# --- the policy ------------------------------------------------------------------------------------------------------

LEFT = np.array([[1.5, 2.0], [0.7, -1.0]])


def test_a_policy_normalizes_what_is_left_by_the_state_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative where the robot's actions are, clipped and padded; a row without is a row with nothing left."""
    seen: list[Any] = []
    acting = policy()
    run = acting._chunk
    monkeypatch.setattr(acting, "_chunk", lambda *args: seen.append(args[-1]) or run(*args))
    huge = np.array([[90.0, -90.0]])
    rows = [observation(LEFT, np.int64(1)), observation(), observation(huge), observation(np.zeros((0, 2)))]
    assert acting.act_batch(rows).shape == (4, 3, 2)
    (given,) = seen
    wanted = np.zeros((4, H, D))
    wanted[0, :2, :2] = [[0.5, 2 * 4 / 6 - 1], [-0.3, 2 * 1 / 6 - 1]]  # less the state, 1; then by the quantiles
    wanted[2, 0, :2] = [2, -2]
    assert np.allclose(given.actions, wanted, atol=1e-6)
    assert given.delay.tolist() == [1, 0, 0, 0] and given.length.tolist() == [2, 0, 1, 0]


def test_a_policy_goes_on_from_what_is_left() -> None:
    """Trained for it exactly, guided nearly. Control: without it neither."""
    guided, trained = policy(), policy(2)
    plain = guided.act(observation(), seed=(3,))
    far = np.abs(plain[:2] - LEFT).mean()
    assert np.allclose(trained.act(observation(LEFT, 2), seed=(3,))[:2], LEFT, atol=1e-5)
    assert np.abs(guided.act(observation(LEFT, 2), seed=(3,))[:2] - LEFT).mean() < 0.5 * far
    assert far > 0.1 and np.allclose(trained.act(observation(), seed=(3,)), plain)


def test_a_policy_without_anything_left_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain program, to the last bit; a batch in which another row has something left, nearly."""
    acting = policy()
    plain = acting.act_batch([observation()] * 2, seeds=[(1,), (2,)])
    none = acting.act_batch([observation(previous=None), observation()], seeds=[(1,), (2,)])
    assert np.array_equal(plain, none)
    mixed = acting.act_batch([observation(LEFT, 1), observation()], seeds=[(1,), (2,)])
    assert np.allclose(mixed[1], plain[1], atol=1e-4) and np.abs(mixed[0] - plain[0]).max() > FAR


@pytest.mark.parametrize(
    ("left", "delay", "message"),
    [
        (np.zeros(2), 0, r"actions are float64\[2\], expected numbers of shape \[n, 2\], n from 0 to 3"),
        (np.zeros((2, 3)), 0, r"actions are float64\[2, 3\]"),
        (np.zeros((4, 2)), 0, r"actions are float64\[4, 2\]"),
        (np.zeros((2, 2), bool), 0, r"actions are bool\[2, 2\]"),
        ([[0.0, 0.0], [0.0]], 0, r"actions are \[\[0.0, 0.0\], \[0.0\]\]"),
        ([[0.0, 0.0], [0.0, np.nan]], 0, r"actions\[1, 1\] is not finite"),
        (np.zeros((2, 2)), 3, "delay is 3, expected an integer from 0 to 2"),
        (np.zeros((2, 2)), -1, "delay is -1"),
        (np.zeros((2, 2)), 1.0, "delay is 1.0"),
        (np.zeros((2, 2)), True, "delay is True"),
        (np.zeros((2, 2)), 2, "expected at most 1, the rtc_max_delay this model was trained with"),
    ],
)
def test_what_is_wrong_with_it_is_said(unchecked: None, left: object, delay: object, message: str) -> None:
    acting = policy(1)
    with pytest.raises(InputError, match=f"previous: {message}|previous: .*{message}"):
        acting.act(observation(left, delay))


@pytest.mark.parametrize("wrong", [3, np.zeros((2, 2)), {"actions": np.zeros((2, 2))}, {"delay": 1}])
def test_what_is_missing_is_said(unchecked: None, wrong: object) -> None:
    with pytest.raises(InputError, match="expected a dict with 'actions' and 'delay'"):
        policy().act(observation(previous=wrong))
