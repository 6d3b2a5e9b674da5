"""The command line as a user meets it: one clear line for what they can mend, and an exit code."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from insula.cli import execute


def insula(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "insula", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", "--run", "r", "--preset", "tinny"), "no preset 'tinny' (did you mean 'tiny'?)"),
        (("train", "--run", "r"), "no data set; give --data"),
        (("train", "--run", "r", "--data", "nowhere"), "nowhere"),
        (("train", "model.lora:lora-config", "--run", "r", "--model.lora.rank", "2", "--data", "nowhere"), "nowhere"),
        (("train", "--run", "r", "--resume"), "nothing to resume"),
        (("train", "--run", "r", "--data", "data.toml"), "data.toml: no such file; insula data describe"),
        (("data", "describe", "nowhere"), "no directory nowhere"),
        (("data", "stats", "nowhere"), "no directory nowhere"),
        (("questions", "--out", ".", "--scenes", "1"), "not empty"),
        (("evaluate", "nowhere"), "no checkpoints here"),
        (("inspect", "--run", "nowhere"), "no train.json here"),
        (("inspect",), "give either --run RUN, or --data DATA"),
        (("collect", "--out", ".", "--episodes", "1"), "not empty"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    arguments: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "something").write_text("here")
    code = execute(arguments)
    said = capsys.readouterr().err
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if line.strip()]
    assert line.startswith("insula: ") and expected in line


def test_nothing_else_is_said_by_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning of what it imports."""
    monkeypatch.chdir(tmp_path)
    done = insula("train", "--run", "r", "--data", "nowhere")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("insula: ") and "nowhere" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("collect", "--out", "d", "--episodes", "0"), "episodes is 0, expected an integer ≥ 1"),
        (("train", "--run", "r", "--batch-size", "0"), "batch_size is 0"),
        (("train", "--run", "r", "--optimizer.expert-lr", "-1"), "expert_lr is -1"),
    ],
)
def test_a_setting_out_of_range_is_a_wrong_command_line(arguments: tuple[str, ...], expected: str) -> None:
    done = insula(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert expected in " ".join(done.stderr.replace("│", " ").split())


def test_a_run_needs_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = insula("train", "--data", "nowhere")
    assert done.returncode == 2 and "--run" in done.stderr and not list(tmp_path.iterdir())


def test_a_wrong_command_and_the_version() -> None:
    assert "no command 'data docter' (did you mean 'doctor'?)" in insula("data", "docter", "x").stderr
    assert insula("--version").stdout == f"insula {version('insula')}\n"


def test_a_flag_that_is_given_twice_is_refused(capsys: pytest.CaptureFixture) -> None:
    """Of two pictures the first would be left out. Control: both behind one flag."""
    for flags in (["--image", "front=a.png", "--image", "wrist=b.png"], ["--one-of=yes", "--one_of", "no"]):
        with pytest.raises(SystemExit, match="2"):
            execute(["ask", "nowhere", "where is it", *flags])
        assert "is given twice" in capsys.readouterr().err
    assert execute(["ask", "nowhere", "where is it", "--image", "front=a.png", "wrist=b.png"]) == 1
    assert "a.png" in capsys.readouterr().err


def test_an_unknown_flag_names_the_nearest() -> None:
    done = insula("train", "--run", "r", "--model.horizn", "8")
    assert done.returncode == 2
    assert "--model.horizon" in done.stdout + done.stderr


def test_help_lists_the_commands() -> None:
    done = insula("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("collect", "pretrain", "train", "evaluate", "demo"))
