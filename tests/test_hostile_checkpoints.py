"""Checkpoints made to hang, to fill the memory or to crash: each is refused in one line that names the file.

What is tried is what a user does with a checkpoint: load a policy, convert, start from its weights, go on with a run.
"""

import dataclasses
import json
import os
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import POLICY, STATS, folder_of_run, small_is_pi05

from insula.checkpoints.loading import load_params
from insula.checkpoints.store import _hush_others
from insula.convert import convert_checkpoint
from insula.data.robot import read_robot
from insula.errors import InsulaError
from insula.model.config import config_from_dict
from insula.policy import Policy
from insula.runs.loading import refuse_leaking
from insula.train.config import TrainConfig, read_config, to_dict
from insula.train.split import split_again

__all__ = ["small_is_pi05"]

DEEP = "[" * 200_000 + "]" * 200_000
STEP = "checkpoints/1/assets"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
INSTEAD: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a loop": lambda path: path.symlink_to(path),
    "nothing": lambda path: path.write_text(""),
    "deep": lambda path: path.write_text(DEEP),
    "deep inside": lambda path: path.write_text(f'{{"model": {DEEP}, "norm_stats": {DEEP}, "steps": {DEEP}}}'),
    "huge": lambda path: path.write_bytes(b" " * (80 * 2**20)),
    "a list": lambda path: path.write_text("[1]"),
    "null": lambda path: path.write_text("null"),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "a pointer": lambda path: path.write_text(POINTER),
    "a web page": lambda path: path.write_text("<!DOCTYPE html><html></html>"),
    "a large number": lambda path: path.write_text("9" * 5000),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and what it was converted to."""
    root = tmp_path_factory.mktemp("sources")
    folder_of_run(root / "run", STATS)
    with pytest.MonkeyPatch.context() as patch:
        small_is_pi05.__wrapped__(patch)  # type: ignore[attr-defined]
        convert_checkpoint(root / "run", root / "insula", "insula")
        convert_checkpoint(root / "run", root / "lerobot", "lerobot")
        convert_checkpoint(root / "run", root / "openpi", "openpi")
    return root


def load(folder: Path) -> Any:
    return Policy.load(folder)


def convert(folder: Path) -> Any:
    return convert_checkpoint(folder, folder.parent / "converted", "insula")


def init(folder: Path) -> Any:
    return load_params(folder, POLICY, jax.random.key(0))


FILES: dict[str, list[Callable[[Path], Any]]] = {
    f"run/{STEP}/config.json": [load, convert],
    f"run/{STEP}/robots/arm/robot.json": [load, convert],
    f"run/{STEP}/robots/arm/norm_stats.json": [load, convert],
    f"run/{STEP}/tokenizer/sequence.json": [load, convert],
    f"run/{STEP}/tokenizer/fast/processor_config.json": [load, convert],
    f"run/{STEP}/tokenizer/fast/tokenizer.json": [load, convert],
    f"run/{STEP}/tokenizer/text/tokenizer.json": [load, convert],
    "insula/config.json": [load, convert],
    "insula/model.safetensors": [load, convert, init],
    "lerobot/config.json": [convert],
    "lerobot/policy_preprocessor.json": [convert],
    "lerobot/policy_preprocessor_step_2_normalizer_processor.safetensors": [convert],
    "lerobot/model.safetensors": [convert, init],
    "openpi/assets/insula/norm_stats.json": [convert],
    "openpi/params/_METADATA": [convert, init],
}


@pytest.fixture
def copied(sources: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the sources, to damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(sources / name, tmp_path / name))

    return copy


def refused(ask: Callable[[], Any]) -> str:
    """The one line of the error."""
    with pytest.raises(InsulaError) as caught:
        ask()
    said = str(caught.value)
    assert "\n" not in said.strip() and len(said) < 700, said
    assert "Errno" not in said and "invalid literal" not in said and "maximum recursion" not in said, said
    return said


@pytest.mark.usefixtures("small_is_pi05", "unchecked")
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_not_what_it_should_be(file: str, copied: Callable[[str], Path]) -> None:
    folder = copied(file.partition("/")[0])
    path = folder.parent / file
    for name, make in INSTEAD.items():
        path.unlink()
        make(path)
        for ask in FILES[file]:
            assert folder.name in refused(lambda ask=ask: ask(folder)), name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        path.write_text("{}")


@pytest.mark.usefixtures("small_is_pi05")
@pytest.mark.parametrize("name", ["run", "insula", "lerobot", "openpi"])
def test_an_undamaged_copy_is_read(name: str, copied: Callable[[str], Path]) -> None:
    """The control of the above."""
    convert(copied(name))


VALUES = ([], {}, None, "x", -1, 0, True, 1.5, 10**30, float("nan"), [[1]], "\ud800")


def entries(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON value but its root; of a list the first entry stands for all."""
    if isinstance(value, dict):
        return [found for key in value for found in ((*path, key), *entries(value[key], (*path, key)))]
    return [(*path, 0), *entries(value[0], (*path, 0))] if isinstance(value, list) and value else []


def changed(value: Any, path: tuple, new: Any) -> Any:
    out = json.loads(json.dumps(value))
    inner = out
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return out


def read_or_refuse(read: Callable[[Any], Any], value: Any) -> bool:
    try:
        read(value)
    except InsulaError as error:
        assert "\n" not in str(error) and "invalid literal" not in str(error), error
        return False
    return True


@pytest.mark.usefixtures("unchecked")
def test_every_value_of_the_settings_is_checked(tmp_path: Path) -> None:
    """Any value in any place is read or refused by name; never a TypeError from deep inside."""
    config = json.loads(json.dumps(dataclasses.asdict(POLICY)))
    settings = json.loads(json.dumps(to_dict(TrainConfig(run=tmp_path))))

    def reread(value: Any) -> Any:
        (tmp_path / "train.json").write_text(json.dumps(value))
        return read_config(tmp_path / "train.json")

    def again(value: Any) -> Any:
        return split_again(value, np.arange(5), "data", "episodes")

    part = {"count": 5, "crc32": 0, "held_out": [1]}
    for value, read in ((config, config_from_dict), (settings, reread), (part, again)):
        outcomes = [read_or_refuse(read, changed(value, place, new)) for place in entries(value) for new in VALUES]
        assert not all(outcomes)
    assert read_or_refuse(config_from_dict, config) and read_or_refuse(reread, settings)  # the control


@pytest.mark.usefixtures("unchecked")
def test_every_value_of_a_robot_is_checked(copied: Callable[[str], Path]) -> None:
    folder = copied("run") / STEP / "robots" / "arm"
    for name in ("robot.json", "norm_stats.json"):
        value = json.loads((folder / name).read_text())

        def read(changed: Any, name: str = name) -> Any:
            (folder / name).write_text(json.dumps(changed))
            return read_robot(folder)

        assert read_or_refuse(read, value)  # the control
        outcomes = [read_or_refuse(read, changed(value, place, new)) for place in entries(value) for new in VALUES]
        assert not all(outcomes)
        read(value)


@pytest.mark.usefixtures("small_is_pi05")
def test_shards_outside_the_folder_are_not_opened(copied: Callable[[str], Path]) -> None:
    folder = copied("insula")
    outside = folder.parent / "secret.safetensors"
    (folder / "model.safetensors").rename(outside)
    for name in ("../secret.safetensors", str(outside), "absent.safetensors", "", ".", 7, None):
        index = {"weight_map": {"backbone.embedding": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "model.safetensors.index.json" in refused(lambda: init(folder))


def test_a_header_that_lies(copied: Callable[[str], Path]) -> None:
    path = copied("insula") / "model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")
    lies: list[dict[str, Any]] = [
        {"shape": [10**12]},
        {"shape": [-1]},
        {"data_offsets": [0, 10**15]},
        {"data_offsets": [8, 0]},
        {"dtype": "F128"},
        {"shape": None},
    ]
    for lie in lies:
        text = json.dumps(header | {first: header[first] | lie}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
        assert "model.safetensors" in refused(lambda: init(path.parent))
    for length in (2**63, 2**40, len(raw)):
        path.write_bytes(struct.pack("<Q", length) + raw[8:])
        assert "model.safetensors" in refused(lambda: init(path.parent))


def test_weights_that_are_no_numbers(copied: Callable[[str], Path]) -> None:
    path = copied("insula") / "model.safetensors"
    tensors = load_file(path)
    tensors["backbone.embedding"] = np.full_like(tensors["backbone.embedding"], np.nan)
    save_file(tensors, path)
    assert "backbone.embedding holds NaN or infinite values" in refused(lambda: init(path.parent))


def test_an_archive_with_objects_or_without_end(tmp_path: Path) -> None:
    """No pickle is opened, and what a member claims is compared before it is unpacked."""
    path = tmp_path / "weights.npz"
    np.savez(path, **{"params/img/embedding/kernel": np.array([{"a": 1}], object)})
    assert "holds object" in refused_in_full(lambda: init(path))

    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    header += b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("params/img/embedding/kernel.npy", "w", force_zip64=True) as member,
    ):
        member.write(header)
        for _ in range(64):
            member.write(bytes(2**20))
    assert "[1000000000000]" in refused_in_full(lambda: init(path))


def refused_in_full(ask: Callable[[], Any]) -> str:
    """An error that lists all that does not fit takes several lines."""
    with pytest.raises(InsulaError) as caught:
        ask()
    return str(caught.value)


@pytest.mark.usefixtures("small_is_pi05")
def test_a_leaking_certificate_cannot_be_talked_away(copied: Callable[[str], Path]) -> None:
    """A damaged certificate is an error and never a pass."""
    folder = copied("run") / STEP
    path = folder / "certificate.json"
    for content in ("{}", '{"outcome": "leaks", "findings": null}', '{"outcome": 1, "findings": []}', DEEP, POINTER):
        path.write_text(content)
        assert "certificate.json" in refused(lambda: refuse_leaking(folder))
    os.remove(path)
    os.mkfifo(path)
    assert "certificate.json" in refused(lambda: refuse_leaking(folder))
    os.remove(path)
    refuse_leaking(folder)  # none at all: said elsewhere, and no leak


def test_a_failed_read_hushes_what_fails_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax' other reads of the same moment, and nothing else."""
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    _hush_others()
    _hush_others()  # once is enough
    closed, other = RuntimeError("Event loop is closed"), RuntimeError("a fault of ours")
    for error in (closed, other):
        sys.unraisablehook(SimpleNamespace(exc_value=error, exc_traceback=None))
    assert [found.exc_value for found in seen] == [other]
