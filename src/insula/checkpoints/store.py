"""A run's checkpoints, written by Orbax: `<step>/{params, train_state, assets}` and a seal.

`params` is the running average, what evaluation and serving load. `assets` holds every file that must travel with it
(config, tokenizer, normalization), so one step directory is enough to serve. Orbax restores a damaged shard without
complaint, so a step that is on disk is sealed by a SHA-256 of each file (insula.checkpoints.seal).

A thread writes while training goes on, from a copy of the state (insula.checkpoints.snapshot). Where several processes
train, each writes its own pieces of the arrays, and process 0 all that is no array.
"""

import dataclasses
import itertools
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from insula.checkpoints.seal import add_to_seal, find_damage, finish_seal, seal
from insula.errors import CheckpointError, InsulaError, brief

log = logging.getLogger(__name__)
# Orbax reports every phase of every save, and each piece of one that fails, with a traceback; we raise once.
logging.getLogger("absl").setLevel(logging.CRITICAL)

WriteAssets = Callable[[Path], None]


class _AssetsHandler(ocp.CheckpointHandler):
    """Runs the caller's writer inside Orbax' atomic save."""

    def save(self, directory: Any, args: "_AssetsSave") -> None:
        if _is_main():
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


def _hush_others() -> None:
    """Orbax reads and writes many arrays at once. Once one has failed the others fail into nothing, some of them later,
    and Python would print each with a traceback around the one line that says what is wrong."""
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


def _reason(error: Exception) -> str:
    """What the system says, where TensorStore tells it behind the names of an array and three folders."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(found.group(1))) if found else brief(error)


def _is_main() -> bool:
    return jax.process_index() == 0


def _free(path: Path) -> Path:
    """`path`, or the first of `path`-2, -3, … that is not there yet."""
    others = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not name.exists())


class CheckpointStore:
    """The `checkpoints/` folder of one run. Saves go on in the background; `close` waits for them."""

    def __init__(self, directory: Path, keep: int = 3, keep_every: int | None = None):
        """The newest `keep` steps stay, and those that `keep_every` divides."""
        directory = Path(directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)

        # Named one by one, processes wait for each other at JAX's coordinator. Else they would by a program on their
        # devices, which from a thread beside the training would come between its own, here before and there after one.
        count = jax.process_count()
        processes = ocp.options.MultiprocessingOptions(active_processes=set(range(count)) if count > 1 else None)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            create=False,
            enable_async_checkpointing=False,  # all of a save is in our thread, not only what Orbax defers
            multiprocessing_options=processes,
        )
        self._manager = ocp.CheckpointManager(directory, options=options)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: list[tuple[int, Future]] = []
        self._sound: set[int] = set()  # looked at already: hashing reads every byte

    # --- writing -----------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Any, served: Callable[[Any], Any], assets: WriteAssets) -> None:
        """Write step `step` in the background: the state, and the parameters in it that are `served`. A step that is
        already there is left alone. The arrays must not be donated meanwhile: give those of a `snapshot`. Waits for the
        save before. Raises CheckpointError where that one could not be written."""
        self.wait()  # one at a time: each holds a copy of the state
        self._later(step, lambda: self._write(step, state, served, assets))

    def add_file(self, step: int, name: str, write: WriteAssets) -> None:
        """Let one more file travel with a step, once that is on disk: `write` is given its path."""

        def add() -> None:
            add_to_seal(self._step(step), self._step(step) / "assets" / name, write)

        if _is_main():
            self._later(step, add)

    def check(self) -> None:
        """Raises CheckpointError where a save has failed meanwhile. Waits for nothing."""
        while self._writing and self._writing[0][1].done():
            step, work = self._writing.pop(0)
            self._raise_failure(step, work)

    def wait(self) -> None:
        """Until all that was begun is on disk, whole and by its name. Raises CheckpointError where it cannot be."""
        while self._writing:
            step, work = self._writing.pop(0)
            self._raise_failure(step, work)

    def _later(self, step: int, work: Callable[[], None]) -> None:
        self._writing.append((step, self._thread.submit(work)))

    def _write(self, step: int, state: Any, served: Callable[[Any], Any], assets: WriteAssets) -> None:
        jax.block_until_ready(state)  # it may be a copy that is still being made, while training needs Python
        if step in self._manager.all_steps():
            return

        params, state = ocp.args.StandardSave(served(state)), ocp.args.StandardSave(state)
        _hush_others()
        self._manager.save(step, args=ocp.args.Composite(params=params, train_state=state, assets=_AssetsSave(assets)))
        if _is_main():
            seal(self._step(step))

    def _raise_failure(self, step: int, work: Future) -> None:
        try:
            work.result()
        except Exception as error:  # Orbax raises dozens of kinds; each means the same to the caller
            raise CheckpointError(
                f"{self._manager.directory}: step {step} cannot be written ({_reason(error)}); "
                "earlier steps are whole. Make room, or mend the folder, and resume"
            ) from error

    def close(self) -> None:
        """Wait for what is being written, and end."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading -----------------------------------------------------------------------------------------------------

    def latest(self) -> int | None:
        """The newest step, None where there is none."""
        self.wait()
        return self._manager.latest_step()

    def assets(self, step: int | None = None) -> Path:
        """The folder of files that travel with a step."""
        self.wait()
        step = self._manager.latest_step() if step is None else step
        if step is None or not (self._step(step) / "assets").is_dir():
            raise CheckpointError(f"{self._manager.directory}: no finished checkpoint (step {step})")
        return self._step(step) / "assets"

    def has_file(self, step: int, name: str) -> bool:
        """Whether a file travels with a finished step."""
        return (self._step(step) / "assets" / name).is_file()

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
            raise CheckpointError(
                f"{self._manager.directory}: no checkpoint is as it was written: {told}. Put one back from a copy, or "
                "start a new run"
            )

        # Of a writer that was killed, or that knew no seals.
        if sound is not None:
            finish_seal(self._step(sound))

        for step in damaged:
            to.mkdir(exist_ok=True)
            shutil.move(self._step(step), _free(to / str(step)))
        if damaged:
            self.look_again()
            log.warning("damaged, moved to %s: %s; going on from step %s", to, told, sound)

        return sound

    def look_again(self) -> None:
        """After another process has moved steps away."""
        self._manager.reload()

    def _damage(self, step: int, parts: Collection[str] | None = None) -> str | None:
        try:
            return find_damage(self._step(step), parts)
        except (InsulaError, OSError) as error:
            return str(error)

    def _step(self, step: int) -> Path:
        return Path(self._manager.directory) / str(step)

    def restore(self, item: str, like: Any, step: int | None = None) -> Any:
        """`item` ("params" or "train_state") in the shapes of `like`; the newest step unless told. Its leaves live
        where those of `like` do, else on one device of this process: they may have been saved on others.

        Raises CheckpointError where there is none, a shape differs, or a leaf is damaged.
        """
        self.wait()
        step = self._manager.latest_step() if step is None else step

        where = f"{self._manager.directory}/{step}/{item}"
        if step is None or step not in self._manager.all_steps():
            known = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise CheckpointError(f"{self._manager.directory}: no checkpoint at step {step}; there are: {known}")

        # What is read here, and what it is read by.
        parts = {item, "assets"}
        if _is_main() and step not in self._sound and (damage := self._damage(step, parts)):
            raise CheckpointError(f"{where}: damaged, {damage}. {self._fall_back(step)}")

        # Shapes and dtypes, so that Orbax checks them before it reads, and places: it would look for the devices of the
        # process that saved.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here), like
        )
        try:
            wanted = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
            restored = self._manager.restore(step, args=wanted)[item]
        except Exception as error:  # Orbax raises dozens of kinds; each means the same to the caller
            _hush_others()
            raise CheckpointError(
                f"{where} cannot be read ({brief(error)}); it is damaged or of another model. {self._fall_back(step)}"
            ) from error

        self._check_shapes(where, restored, like)
        return restored

    def _fall_back(self, step: int) -> str:
        return f"Remove {self._step(step)} to fall back to an earlier step; training --resume does so by itself"

    @staticmethod
    def _check_shapes(where: str, tree: Any, like: Any) -> None:
        wanted, found = _named_leaves(like), _named_leaves(tree)

        # Where nothing was stored Orbax gives None for what was asked for.
        if missing := sorted(wanted.keys() - found.keys()):
            raise CheckpointError(
                f"{where}: {missing[0]} is not in it, and {len(missing) - 1} more; it is of another run"
            )

        # Orbax cuts or pads a leaf of another shape where it can.
        for name, leaf in found.items():
            if leaf.shape != wanted[name].shape:
                raise CheckpointError(
                    f"{where}: {name} has shape {leaf.shape}, the config expects {wanted[name].shape}"
                )
