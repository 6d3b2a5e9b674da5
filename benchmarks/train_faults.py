"""A training that is killed, whose checkpoints are damaged, and whose disk fills up: what it ends with.

python benchmarks/train_faults.py --only kill      kill -9 at 50 instants, 25 of them while a checkpoint is written
python benchmarks/train_faults.py --only damage    200 bytes changed, and files cut short, anywhere in a checkpoint
python benchmarks/train_faults.py --only disk      full, read-only, not ours, a limit on the size of files: on a small
                                                   disk where this user may mount one, else the limit alone

Exit code 1 where a promise is broken: a killed training that ends with other weights, damage that is not found, a fault
of the disk that takes the checkpoint before it along or is not told in a line.
"""

import argparse
import contextlib
import ctypes
import hashlib
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from insula.checkpoints.seal import SEAL_FILE
from insula.checkpoints.store import CheckpointStore
from insula.cli import execute
from insula.parallel.mesh import ONE_DEVICE, make_mesh
from insula.train.config import read_config
from insula.train.optimizer import averaged, make_optimizer
from insula.train.step import abstract_state

EVERY = 5
FLAGS = ["--checkpoint-every", str(EVERY), "--log-every", "1", "--batch-size", "4"]
FLAGS += ["--no-certify", "--held-out-fraction", "0"]
KILLS_OF_A_RUN = 5
SIZE = 300 * 2**20
"""Bytes of the small disk: enough for a few checkpoints of the preset `tiny`, and no more."""


# --- a training in a process of its own ------------------------------------------------------------------------------


def forked(work: Callable[[], int], said: Path | None = None) -> int:
    """Run `work` in a process of its own, which has imported all there is to import; returns its number."""
    sys.stdout.flush()  # else what is not written yet is written by both, and the child's last words are not its own
    child = os.fork()
    if child:
        return child

    code = 1
    try:
        if said is not None:
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(out, 1)
            os.dup2(out, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Its exit code, once it has one."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(run: Path, data: Path, said: Path) -> int:
    """Begin, or go on with what is there; returns the process."""
    begun = any(saved(run))
    more = ["--resume"] if begun else ["--data", str(data), *FLAGS]
    return forked(lambda: execute(["train", "--run", str(run), *more]), said)


def saved(run: Path) -> list[int]:
    """Steps of finished checkpoints."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is there in part: unfinished, or not sealed."""
    folder = run / "checkpoints"
    with contextlib.suppress(FileNotFoundError):  # a step that has just got its name
        return folder.is_dir() and any(
            "tmp" in path.name or (path.name.isdigit() and not (path / SEAL_FILE).is_file())
            for path in folder.iterdir()
        )
    return False


def weights(run: Path, folder: Path) -> str:
    """SHA-256 of all of the newest training state."""
    path = folder / "digest"

    def look() -> int:
        config = read_config(run / "train.json")
        optimizer = make_optimizer(config.optimizer, config.model, config.steps)
        having = averaged(config.optimizer, config.model)
        with CheckpointStore(run / "checkpoints") as store:
            state = store.restore("train_state", abstract_state(config.model, optimizer, make_mesh(ONE_DEVICE), having))
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(state):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        path.write_text(f"{int(state.step)} {digest.hexdigest()}")
        return 0

    assert ended(forked(look)) == 0
    return path.read_text()


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def try_kills(folder: Path, data: Path, kills: int, whole: str, rng: np.random.Generator) -> list[str]:
    """Kill as many times, half of them in a save, and let each run end; what was broken."""
    broken, done, in_saves, number = [], 0, 0, 0
    while done < kills or in_saves < kills // 2:
        run, said = folder / f"killed-{number}", folder / f"killed-{number}.txt"
        number += 1
        for _ in range(KILLS_OF_A_RUN):
            if done >= kills and in_saves >= kills // 2:
                break
            wanted = in_saves < kills // 2 and rng.random() < 0.6
            killed, saving = kill_once(run, data, said, wanted, rng)
            done, in_saves = done + killed, in_saves + (killed and saving)
            if killed:
                print(f"kill {done}: {'in a save' if saving else 'between saves'}, steps {saved(run)}", flush=True)

        code = ended(train(run, data, said))
        if code or weights(run, folder) != whole:
            broken.append(f"{run.name}: exit code {code}, {weights(run, folder)} and not {whole}\n{tail(said)}")
        shutil.rmtree(run)

    print(
        f"{done} kills, {in_saves} of them in a save, in {number} trainings: {number - len(broken)} ended with the same"
    )
    return broken


def kill_once(run: Path, data: Path, said: Path, in_save: bool, rng: np.random.Generator) -> tuple[bool, bool]:
    """Start, and kill at a random instant once it trains. Returns whether it was killed, and in a save."""
    log = run / "metrics.jsonl"
    before = log.stat().st_size if log.exists() else 0
    # Saves that it may finish first: else none would come further than to the first.
    least = max(saved(run), default=0) + EVERY * int(rng.integers(0, 3))
    child = train(run, data, said)

    def training() -> bool:
        return log.exists() and log.stat().st_size > before and max(saved(run), default=0) >= least

    # What an earlier kill left in mid-save is gone once it trains.
    while not training() or (in_save and not is_saving(run)):
        if os.waitpid(child, os.WNOHANG)[0]:
            return False, False  # it was done, or had nothing left to do
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.3 if in_save else 1.5))
    os.kill(child, signal.SIGKILL)
    killed = ended(child) == -signal.SIGKILL
    return killed, is_saving(run)


def tail(path: Path) -> str:
    return "".join(path.read_text(errors="replace").splitlines(keepends=True)[-8:])


# --- damage ----------------------------------------------------------------------------------------------------------


def try_damage(run: Path, folder: Path, damages: int, rng: np.random.Generator) -> list[str]:
    """Change a byte, or cut a file short; is it named, and the step before it taken?"""
    logging.disable(logging.WARNING)  # it says so two hundred times
    good, newest = saved(run)[-2:]
    step = run / "checkpoints" / str(newest)
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    broken = []
    for n in range(damages):
        path = files[n % len(files)]
        kept = path.read_bytes()
        at = int(rng.integers(len(kept)))
        changed = (
            kept[:at] if n % 4 == 3 else kept[:at] + bytes([kept[at] ^ (1 << int(rng.integers(8)))]) + kept[at + 1 :]
        )
        path.write_bytes(changed)

        with CheckpointStore(run / "checkpoints") as store:
            taken = store.set_damaged_aside(folder / "damaged")
        aside = folder / "damaged" / str(newest)
        if taken != good or not aside.is_dir():
            broken.append(f"{path.relative_to(step)}: byte {at} of {len(kept)} was not found")
        else:
            shutil.move(aside, step)
        path.write_bytes(kept)

    print(
        f"{damages} damages to {len(files)} files of a checkpoint: {damages - len(broken)} found, the step before taken"
    )
    return broken


# --- the disk --------------------------------------------------------------------------------------------------------


def try_disk(folder: Path, data: Path, whole: str, disks: int) -> list[str]:
    """Each fault in a run of its own: it ends with a line, its checkpoints are whole, and it goes on once mended."""
    broken = []
    root = os.geteuid() == 0
    if not root:
        print("without root no disk is mounted: a limit on the size of files alone", flush=True)
    for name, fault in list((FAULTS if root else {LIMIT: limit_files}).items())[:disks]:
        place = folder / f"disk-{name.replace(' ', '-')}"
        with small_disk(place) if root else plain(place):
            problem = try_fault(fault, place / "run", data, folder / f"{place.name}.txt", whole)
        print(f"{name}: {problem or 'told in a line, the checkpoint before it whole, the same weights in the end'}")
        broken += [f"{name}: {problem}"] if problem else []

    return broken


def try_fault(fault: Callable[[Path, Path, Path], int], run: Path, data: Path, said: Path, whole: str) -> str | None:
    """What was broken, if anything was."""
    code = fault(run, data, said)
    text = said.read_text(errors="replace")
    told = text.rstrip().splitlines()[-1]
    if code != 1 or "Traceback" in text or not told.startswith("insula: ") or str(run) not in told:
        return f"exit code {code}, and said: {tail(said)}"
    if not saved(run):
        return f"no checkpoint is left: {tail(said)}"
    if code := ended(train(run, data, said)):
        return f"it does not go on, exit code {code}: {tail(said)}"
    return None if weights(run, said.parent) == whole else "it ended with other weights"


def until_first_checkpoint(run: Path) -> None:
    while not any((run / "checkpoints" / str(step) / SEAL_FILE).is_file() for step in saved(run)):
        time.sleep(0.01)


def train_with(run: Path, data: Path, then: Callable[[], None]) -> int:
    """Train in this process, and let something happen once the first checkpoint is sealed."""

    def wait() -> None:
        until_first_checkpoint(run)
        then()

    threading.Thread(target=wait, daemon=True).start()
    return execute(["train", "--run", str(run), "--data", str(data), *FLAGS])


def limit_files(run: Path, data: Path, said: Path) -> int:
    """No file may grow beyond a megabyte, by a quota: noticed in the middle of a save."""

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        return train_with(run, data, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard)))

    return ended(forked(work, said))


def fill_up(run: Path, data: Path, said: Path) -> int:
    """Somebody else takes all but a part of what a checkpoint needs."""
    room, filler = 10 * 2**20, run.parent / "filler"

    def fill() -> None:
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while (free := os.statvfs(run.parent).f_bavail * os.statvfs(run.parent).f_frsize) > room:
                file.write(bytes(min(free - room, 2**20)))
                file.flush()

    code = ended(forked(lambda: train_with(run, data, fill), said))
    filler.unlink()
    return code


def take_permission(run: Path, data: Path, said: Path) -> int:
    """The folder of checkpoints is no longer ours to write to."""

    def work() -> int:
        obey_permissions()
        return train_with(run, data, lambda: (run / "checkpoints").chmod(0o555))

    code = ended(forked(work, said))
    (run / "checkpoints").chmod(0o755)
    return code


def obey_permissions() -> None:
    """Take from this process what lets root write anywhere (CAP_DAC_OVERRIDE)."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << 1)  # of the effective set
    assert libc.capset(header, sets) == 0


def lock_up(run: Path, data: Path, said: Path) -> int:
    """The disk has become read-only when a killed run is to go on."""
    child = train(run, data, said)
    until_first_checkpoint(run)
    os.kill(child, signal.SIGKILL)
    ended(child)
    remount(run.parent, "ro")
    code = ended(train(run, data, said))
    remount(run.parent, "rw")
    return code


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


LIMIT = "a limit on the size of files"
FAULTS = {
    LIMIT: limit_files,
    "a full disk": fill_up,
    "lost permissions": take_permission,
    "a read-only disk": lock_up,
}


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[None]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def plain(place: Path) -> Iterator[None]:
    place.mkdir()
    yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["kill", "damage", "disk"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--disks", type=int, default=len(FAULTS), help="the first so many faults of a disk")
    parser.add_argument("--steps", type=int, default=40, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    FLAGS.extend(["--steps", str(given.steps)])
    rng = np.random.default_rng(given.seed)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        data = folder / "data"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
        said = folder / "whole.txt"
        made = ended(forked(lambda: execute(["collect", "--out", str(data), "--episodes", "4"]), said))
        run = folder / "whole"
        if made or ended(train(run, data, said)):
            print(tail(said))
            return 1
        whole = weights(run, folder)

        broken = []
        if given.only in (None, "kill"):
            broken += try_kills(folder, data, given.kills, whole, rng)
        if given.only in (None, "disk"):
            broken += try_disk(folder, data, whole, given.disks)
        if given.only in (None, "damage"):  # last: it starts JAX here, which a fork would not survive
            broken += try_damage(run, folder, given.damages, rng)

    print("\n".join(["BROKEN", *broken] if broken else ["every promise was kept"]))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
