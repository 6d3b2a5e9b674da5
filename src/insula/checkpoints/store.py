"""A run's checkpoints, written by Orbax: `<step>/{params, train_state, manifest, assets}`.

`params` is the running average, what evaluation and serving load. `assets` holds every file that must travel with it
(config, tokenizer, normalization), so one step directory is enough to serve. Two checks, because Orbax restores a
damaged shard without complaint: `manifest` holds a checksum of each leaf as it was in memory, and a step that is on
disk is sealed by a SHA-256 of each file (insula.checkpoints.seal).
"""

import dataclasses
import itertools
import logging
import shutil
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from insula.checkpoints.seal import add_to_seal, find_damage, seal
from insula.errors import CheckpointError, InsulaError, brief

log = logging.getLogger(__name__)
logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every phase of every save

WriteAssets = Callable[[Path], None]


class _AssetsHandler(ocp.CheckpointHandler):
    """Runs the caller's writer inside Orbax' atomic save."""

    def save(self, directory: Any, args: "_AssetsSave") -> None:
        args.write(Path(directory))

    def restore(self, directory: Any, args: Any = None) -> Path:
        return Path(directory)


@ocp.args.register_with_handler(_AssetsHandler, for_save=True)
@dataclasses.dataclass
class _AssetsSave(ocp.args.CheckpointArgs):
    write: WriteAssets


@ocp.args.register_with_handler(_AssetsHandler, for_restore=True)
@dataclasses.dataclass
class _AssetsRestore(ocp.args.CheckpointArgs):
    pass


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _hush_other_reads() -> None:
    """Orbax reads many arrays at once. Once one has failed the others fail into nothing, some of them later, and Python
    would print each with a traceback around the one line that says what is wrong."""
    previous = sys.unraisablehook
    if getattr(previous, "hushes", False):
        return

    def hook(unraisable: Any) -> None:
        frames = traceback.extract_tb(unraisable.exc_traceback)
        of_orbax = any("orbax" in frame.filename or "tensorstore" in frame.filename for frame in frames)
        if not of_orbax and "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    hook.hushes = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of each leaf's bytes, by its path."""
    return {name: zlib.crc32(np.ascontiguousarray(leaf).data) for name, leaf in _named_leaves(tree).items()}


def _free(path: Path) -> Path:
    """`path`, or the first of `path`-2, -3, … that is not there yet."""
    others = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not name.exists())


class CheckpointStore:
    """The `checkpoints/` folder of one run. Saves go on in the background; `close` waits for them."""

    def __init__(self, directory: Path, keep: int = 3, keep_every: int | None = None):
        """The newest `keep` steps stay, and those that `keep_every` divides."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every, create=True)
        self._saved: list[int] = []  # by this process, and not sealed yet
        self._sound: set[int] = set()  # looked at already: hashing reads every byte
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def save(self, step: int, params: Any, train_state: Any, assets: WriteAssets) -> None:
        """Write step `step`; a step that is already there is left alone."""
        if self.has(step):
            return

        # Checksums of what is in memory now: of the file they would vouch for whatever the disk made of it.
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            train_state=ocp.args.StandardSave(train_state),
            manifest=ocp.args.JsonSave({"params": checksums(params), "train_state": checksums(train_state)}),
            assets=_AssetsSave(assets),
        )
        self.wait()
        try:
            self._manager.save(step, args=items)
        except Exception as error:  # Orbax raises dozens of kinds; each means the same to the caller
            raise self._unwritten(step, error) from error
        self._saved.append(step)

    def wait(self) -> None:
        """Until every save is on disk, whole and by its name. Raises CheckpointError where one cannot be written."""
        try:
            self._manager.wait_until_finished()
            while self._saved:
                seal(self._step(self._saved[0]))
                self._saved.pop(0)
        except Exception as error:
            raise self._unwritten("that is being written", error) from error

    def has_file(self, step: int, name: str) -> bool:
        """Whether a file travels with a finished step."""
        return (self._step(step) / "assets" / name).is_file()

    def add_file(self, step: int, name: str, write: WriteAssets) -> None:
        """Let one more file travel with a step, once that is on disk: `write` is given its path."""
        self.wait()
        path = self.assets(step) / name
        write(path)
        add_to_seal(self._step(step), path)

    def set_damaged_aside(self, to: Path) -> int | None:
        """Move every step that is newer than the newest sound one into the folder `to`, and say so. Returns that sound
        step, None where there are no steps. Raises CheckpointError where none is sound; then nothing is moved."""
        damaged: dict[int, str] = {}
        sound = None
        for step in sorted(self._manager.all_steps(), reverse=True):
            if (damage := self._damage(step)) is None:
                sound = step
                self._sound.add(step)
                break
            damaged[step] = damage

        told = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
        if damaged and sound is None:
            raise CheckpointError(f"{self._manager.directory}: no checkpoint is as it was written: {told}")

        for step in damaged:
            to.mkdir(exist_ok=True)
            shutil.move(self._step(step), _free(to / str(step)))
        if damaged:
            self._manager.reload()
            log.warning("damaged, moved to %s: %s; going on from step %s", to, told, sound)

        return sound

    def _damage(self, step: int) -> str | None:
        try:
            return find_damage(self._step(step))
        except (InsulaError, OSError) as error:
            return str(error)

    def _step(self, step: int) -> Path:
        return Path(self._manager.directory) / str(step)

    def has(self, step: int) -> bool:
        """Whether a step is there, or being written."""
        return step in self._manager.all_steps()

    def latest(self) -> int | None:
        """The newest step, None where there is none."""
        return self._manager.latest_step()

    def restore(self, item: str, like: Any, step: int | None = None) -> Any:
        """`item` ("params" or "train_state") in the shapes of `like`; the newest step unless told. Its leaves live
        where those of `like` do, else on one device of this process: they may have been saved on others.

        Raises CheckpointError where there is none, a shape differs, or a leaf is damaged.
        """
        step = self._manager.latest_step() if step is None else step

        where = f"{self._manager.directory}/{step}/{item}"
        if step is None or step not in self._manager.all_steps():
            known = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise CheckpointError(f"{self._manager.directory}: no checkpoint at step {step}; there are: {known}")

        # What is read here, and what it is read by.
        parts = {item, "manifest", "assets"}
        if step not in self._sound and (damage := find_damage(self._step(step), parts)):
            raise CheckpointError(f"{where}: damaged, {damage}. {self._fall_back(step)}")

        # Shapes and dtypes, so that Orbax checks them before it reads, and places: it would look for the devices of the
        # process that saved.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here), like
        )
        try:
            wanted = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)}, manifest=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=wanted)
        except Exception as error:  # Orbax raises dozens of kinds; each means the same to the caller
            _hush_other_reads()
            raise CheckpointError(
                f"{where} cannot be read ({brief(error)}); it is damaged or of another model. {self._fall_back(step)}"
            ) from error

        self._verify(where, restored[item], like, restored["manifest"][item])
        return restored[item]

    def _fall_back(self, step: int) -> str:
        return f"Remove {self._step(step)} to fall back to an earlier step; training --resume does so by itself"

    @staticmethod
    def _verify(where: str, tree: Any, like: Any, expected: dict[str, int]) -> None:
        wanted = _named_leaves(like)

        # Orbax cuts or pads a leaf of another shape where it can.
        for name, leaf in _named_leaves(tree).items():
            if leaf.shape != wanted[name].shape:
                raise CheckpointError(
                    f"{where}: {name} has shape {leaf.shape}, the config expects {wanted[name].shape}"
                )

        for name, value in checksums(tree).items():
            if value != expected.get(name):
                raise CheckpointError(
                    f"{where}: {name} is damaged, its checksum does not match the manifest; "
                    "remove this step to fall back to an earlier one"
                )

    def assets(self, step: int | None = None) -> Path:
        """The folder of files that travel with a step."""
        step = self._manager.latest_step() if step is None else step
        if step is None or not (self._step(step) / "assets").is_dir():
            raise CheckpointError(f"{self._manager.directory}: no finished checkpoint (step {step})")
        return self._step(step) / "assets"

    def close(self) -> None:
        """Wait for what is being written, and end."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _unwritten(self, step: object, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self._manager.directory}: step {step} cannot be written ({brief(error)}); "
            "earlier steps are whole. Make room, or mend the folder, and resume"
        )

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
