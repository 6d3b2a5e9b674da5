"""Watching a run: where metrics go, how fast it is said to be, and traces of its steps."""

import dataclasses
import gzip
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from small import SMALL

from insula.errors import FileError, InputError, NonFiniteError
from insula.parallel.devices import DEVICES, KINDS, peak_of
from insula.parallel.mesh import MeshConfig, make_mesh
from insula.train import sinks
from insula.train.config import TrainConfig, read_config, to_dict
from insula.train.loop import MetricsLog, run_loop
from insula.train.profile import Profile
from insula.train.rates import Rates, make_rates, model_flops
from insula.train.resume import MAY_CHANGE
from insula.train.run import train
from insula.train.step import TrainState


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclasses.dataclass
class Recorder:
    """A sink that keeps what it is given, and fails from the row on that it is told to."""

    fails_at: int = 1000
    taken: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    closed: list[bool] = dataclasses.field(default_factory=list)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if len(self.taken) >= self.fails_at:
            raise OSError(28, "No space left on device")
        self.taken.append((step, metrics))

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


# --- sinks ------------------------------------------------------------------------------------------------------------


def test_each_sink_gets_every_row(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    with MetricsLog(tmp_path / "metrics.jsonl", {"first": first, "second": second}) as log:
        log.write(1, {"flow": 0.123456789})
        log.note(2, {"flow": float("nan")})
    assert first.taken[0] == (1, {"flow": 0.123456789}) and len(first.taken) == len(second.taken) == 2
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "flow": 0.123457}, {"step": 2, "flow": "nan"}]
    assert first.closed == second.closed == [False]


def test_a_sink_that_fails_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By name, once; the others and the file have everything."""
    bad, good = Recorder(fails_at=2), Recorder()
    with MetricsLog(tmp_path / "metrics.jsonl", {"wandb": bad, "trackio": good}) as log:
        for step in range(1, 6):
            log.write(step, {"flow": 1.0})
    assert len(bad.taken) == 2 and len(good.taken) == len(rows(tmp_path / "metrics.jsonl")) == 5
    (record,) = caplog.records
    assert "wandb takes no more metrics (OSError: [Errno 28] No space left on device)" in record.message


def test_a_sink_hears_how_a_run_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = Recorder()
    with pytest.raises(NonFiniteError), MetricsLog(tmp_path / "metrics.jsonl", {"wandb": sink}) as log:
        log.write(1, {"flow": float("nan")})
    assert sink.closed == [True] and not caplog.records


def test_a_sink_that_cannot_be_closed_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Recorder):
        def close(self, failed: bool) -> None:
            raise ConnectionError("the server has gone")

    with MetricsLog(tmp_path / "metrics.jsonl", {"wandb": Stuck()}):
        pass
    assert "wandb takes no more metrics (ConnectionError: the server has gone)" in caplog.text


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio",) * 2])
def test_a_sink_that_is_not_installed_is_named(
    kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"log_to: {kind} is not installed .*pip install 'insula\[{kind}\]'"):
        sinks.open_sinks((kind,), tmp_path, {})


def test_a_sink_that_cannot_be_opened_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that were open already are closed."""

    def refused(*args: Any) -> Any:
        raise RuntimeError("No API key configured.")

    first = Recorder()
    monkeypatch.setattr(sinks, "OPEN", {"trackio": lambda *args: first, "wandb": refused})
    with pytest.raises(InputError, match=r"wandb cannot be opened: RuntimeError: No API key.*WANDB_MODE=offline"):
        sinks.open_sinks(("trackio", "wandb"), tmp_path, {})
    assert first.closed == [True]


def test_a_run_keeps_its_name(tmp_path: Path) -> None:
    """In its folder, wherever that is moved to. Control: another folder of that name has another."""
    run = tmp_path / "pick and place"
    run.mkdir()
    name = sinks.run_name(run)
    assert name.startswith("pick-and-place-") and sinks.run_name(run) == name
    assert sinks.run_name(run.rename(tmp_path / "moved")) == name

    run.mkdir()
    assert sinks.run_name(run) != name
    (run / "name").write_text("a name/with a slash")
    with pytest.raises(FileError, match="got 'a name/with a slash'"):
        sinks.run_name(run)


def test_weights_and_biases_is_told_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the calls we make of it; a step that goes back is no step of its own."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def define_metric(self, name: str, step_metric: str) -> None:
            calls.append(("define", (name, step_metric)))

        def log(self, row: dict[str, float]) -> None:
            calls.append(("log", row))

        def finish(self, exit_code: int) -> None:
            calls.append(("finish", exit_code))

    fake = types.ModuleType("wandb")
    fake.Settings = lambda **settings: settings  # type: ignore[attr-defined]
    fake.init = lambda **asked: calls.append(("init", asked)) or Run()  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    for failed in (True, False):  # the second goes on with the first
        sink = sinks.open_sinks(("wandb",), tmp_path, {"steps": 3})["wandb"]
        sink.write(2, {"flow": 0.5})
        sink.close(failed)
    (_, first), (_, second) = (call for call in calls if call[0] == "init")
    assert first == second and first["id"] == sinks.run_name(tmp_path) and first["resume"] == "allow"
    assert first["project"] == "insula" and first["dir"] == str(tmp_path) and first["config"] == {"steps": 3}
    assert calls[1:4] == [("define", ("*", "step")), ("log", {"step": 2, "flow": 0.5}), ("finish", 1)]
    assert calls[-1] == ("finish", 0)


def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with MetricsLog(tmp_path / "metrics.jsonl", sinks.open_sinks(("tensorboard",), tmp_path, {})) as log:
        log.write(7, {"held_out/flow": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"held_out/flow" in events.read_bytes()


def test_trackio_goes_on_with_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for step in (1, 2):
        with MetricsLog(tmp_path / "metrics.jsonl", sinks.open_sinks(("trackio",), tmp_path, {})) as log:
            log.write(step, {"flow": 0.5})
    assert (tmp_path / "name").is_file()


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_of_older_runs_are_read(tmp_path: Path) -> None:
    """`tensorboard` was a switch."""
    written = json.loads(json.dumps(to_dict(TrainConfig(run=tmp_path))))
    del written["log_to"], written["profile_steps"]
    path = tmp_path / "train.json"
    for old, new in ((True, ("tensorboard",)), (False, ())):
        path.write_text(json.dumps(written | {"tensorboard": old}))
        assert read_config(path).log_to == new
    path.write_text(json.dumps(written | {"log_to": ["wandb", "trackio"], "profile_steps": [2, 3]}))
    assert read_config(path).log_to == ("wandb", "trackio") and read_config(path).profile_steps == (2, 3)
    assert {"log_to", "profile_steps"} <= MAY_CHANGE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_to": ("wandb", "wandb")}, "log_to names wandb twice"),
        ({"profile_steps": (0, 3)}, r"profile_steps is 0 3, expected .* from 1 to steps = 10"),
        ({"profile_steps": (4, 3)}, "profile_steps is 4 3"),
        ({"profile_steps": (4, 11)}, "profile_steps is 4 11"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str, unchecked: None) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(run=Path("run"), steps=10, **settings)


def test_a_sink_nobody_knows_is_refused_with_the_file(tmp_path: Path, unchecked: None) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(to_dict(TrainConfig(run=tmp_path)) | {"log_to": ["wandbb"]}))
    with pytest.raises(InputError, match=r"log_to is \['wandbb'\]"):
        read_config(path)


# --- how fast ---------------------------------------------------------------------------------------------------------


def test_rates_are_those_of_the_duration() -> None:
    """Counted once, and never where no peak is known: then nothing is made up."""
    counted: list[int] = []

    def flops() -> int:
        counted.append(1)
        return 4 * 10**12

    rates = Rates(32, peak=100e12, flops=flops)
    assert rates(0.5) == {"samples_per_second": 64.0, "mfu": pytest.approx(0.08)}
    assert rates(0.1)["mfu"] == pytest.approx(0.4) and len(counted) == 1
    assert Rates(32, peak=None, flops=flops)(0.5) == {"samples_per_second": 64.0} and len(counted) == 1


def test_a_program_that_cannot_be_counted_has_no_mfu(caplog: pytest.LogCaptureFixture) -> None:
    def unknown() -> int:
        raise NotImplementedError("a loop of unknown length")

    rates = Rates(32, peak=1e12, flops=unknown)
    assert [set(rates(1.0)) for _ in range(2)] == [{"samples_per_second"}] * 2
    assert len(caplog.records) == 1 and "no MFU is logged: a loop of unknown length" in caplog.text


def test_recomputation_is_no_model_flop() -> None:
    """Control: without products a batch twice as large would not have twice as many."""
    config = TrainConfig(run=Path("run"), model=SMALL, batch_size=4)
    mesh = make_mesh(MeshConfig(1, 1, 1))
    plain = model_flops(config, mesh)
    assert model_flops(dataclasses.replace(config, model=SMALL.with_compute(remat="all")), mesh) == plain > 0
    assert model_flops(dataclasses.replace(config, batch_size=8), mesh) == pytest.approx(2 * plain, rel=0.01)
    assert model_flops(dataclasses.replace(config, batch_size=8, accumulate=2), mesh) == pytest.approx(
        2 * plain, rel=0.01
    )


def test_a_peak_is_known_by_the_whole_name() -> None:
    assert set(KINDS.values()) == set(DEVICES)
    assert peak_of("NVIDIA H200") == 989e12 and peak_of("TPU v5 lite") == 197e12
    assert [peak_of(kind) for kind in ("cpu", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090 D")] == [None] * 3


def test_a_cpu_has_no_mfu_and_all_devices_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(run=Path("run"), model=SMALL, batch_size=8)
    mesh = make_mesh(MeshConfig(4, 1, 1))
    assert set(make_rates(config, mesh)(1.0)) == {"samples_per_second"}

    monkeypatch.setitem(KINDS, jax.devices()[0].device_kind, "h200")
    whole = make_rates(config, mesh)(1.0)["mfu"]
    assert whole == pytest.approx(model_flops(config, mesh) / (4 * 989e12))


# --- traces, and all of it in a loop ----------------------------------------------------------------------------------


@jax.jit
def traced_update(state: TrainState, batch: float) -> tuple[TrainState, dict[str, jax.Array]]:
    return dataclasses.replace(state, step=state.step + 1), {"flow": jnp.sin(batch)}


def loop(folder: Path, steps: int, profile: Profile | None = None, rates: Any = None, start: int = 0) -> Path:
    state = TrainState(jnp.asarray(start, jnp.int32), (), (), ())  # type: ignore[arg-type]
    with MetricsLog(folder / "metrics.jsonl") as log:
        given = {"rates": rates} if rates else {}
        run_loop(state, traced_update, iter([1.0] * 100), steps, log, 2, quiet=True, profile=profile, **given)
    return folder / "metrics.jsonl"


def traced_steps(folder: Path) -> set[int]:
    """The updates that a trace holds."""
    (path,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {int(event["args"]["step_num"]) for event in events if event.get("name") == "update"}


@pytest.mark.parametrize(("steps", "last"), [((3, 5), 5), ((6, 20), 8)])
def test_a_trace_holds_the_steps_that_were_asked_for(
    steps: tuple[int, int], last: int, tmp_path: Path, unchecked: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Those there were, where the run ends before the last."""
    loop(tmp_path, 8, Profile(tmp_path / "profile", steps))
    assert traced_steps(tmp_path / "profile") == set(range(steps[0], last + 1))
    (record,) = caplog.records
    assert f"a trace of steps {steps[0]} to {last} is in {tmp_path / 'profile'}" in record.message


def test_steps_that_are_past_are_told_of(tmp_path: Path, unchecked: None, caplog: pytest.LogCaptureFixture) -> None:
    loop(tmp_path, 8, Profile(tmp_path / "profile", (2, 3)), start=5)
    assert "nothing is traced: steps 2 to 3 were not made here" in caplog.text and not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_made_ends_no_run(
    tmp_path: Path, unchecked: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("Only one profile may be run at a time.")

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    found = rows(loop(tmp_path, 8, Profile(tmp_path / "profile", (2, 3))))
    assert found[-1]["step"] == 8 and "Only one profile may be run at a time" in caplog.text
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_the_log_has_rates(tmp_path: Path, unchecked: None) -> None:
    found = rows(loop(tmp_path, 4, rates=lambda seconds: {"samples_per_second": 8 / seconds}))
    for row in found:
        assert row["samples_per_second"] * row["step_seconds"] == pytest.approx(8, rel=1e-4)


def test_a_missing_sink_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb is not installed"):
        train(TrainConfig(run=tmp_path / "run", data=tmp_path / "nowhere", log_to=("wandb",), mesh=MeshConfig(1, 1, 1)))
