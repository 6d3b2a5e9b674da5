"""Mutated frames against the reader of frames: nothing but an observation or a typed refusal may come out.

python scripts/fuzz_frames.py --frames 1000000

Raises AssertionError naming seed and frame for any other outcome, for a frame that allocates more than 64 MiB, for a
path or a traceback in a refusal. The same seed gives the same frames.
"""

import argparse
import random
import time
import tracemalloc
from collections import Counter

import numpy as np

from insula.client.protocol import ErrorKind, pack, unpack
from insula.errors import ProtocolError
from insula.serve.observations import parse_renames, read_request

MOST_ALLOCATED = 64 * 2**20
MEASURED_EVERY = 50  # frames: measuring memory makes each several times slower
RENAMES = parse_renames(["joints=state", "gripper=state", "camera=images.front"])
SECRETS = ("Traceback", ".py", "/home", "/usr", "site-packages")
# Bytes that mean something to msgpack: containers, and lengths that are not true.
TELLING = bytes([0x80, 0x8F, 0x90, 0x9F, 0xC0, 0xC1, 0xC4, 0xC6, 0xC7, 0xC9, 0xCB, 0xD4, 0xD9, 0xDB, 0xDD, 0xDF, 0xFF])


def seeds_of_frames() -> list[bytes]:
    """Good frames of every kind, to begin from."""
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    state = np.linspace(-1, 1, 5)
    nested = {"images": {"front": picture, "wrist": picture}, "state": state, "task": "put it away"}
    flat = {"observation/image/front": picture, "observation/state": state.astype("<f4"), "prompt": "put it away"}
    parts = {"joints": [0.0, 1.0], "gripper": np.float64(0.5), "camera": picture, "seed": [1, 2], "max_age_ms": 100}
    ongoing = nested | {"previous": {"actions": np.zeros((4, 7), "<f4"), "delay": 2}}
    kinds = {name: np.ones(3, name) for name in ("uint8", "bool", "int32", "int64", "float32", "float64")}
    return [pack(message) for message in (nested, flat, parts, ongoing, kinds)]


def mutate(frame: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to three changes of random kinds: after more, most frames end at their first byte."""
    mutated = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(mutated) + 1)
        end = min(len(mutated), place + rng.randint(1, 16))
        match rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 5, 6)):
            case 0 if place < len(mutated):
                mutated[place] ^= 1 << rng.randrange(8)
            case 1 if place < len(mutated):
                mutated[place] = rng.choice(TELLING)
            case 2:
                del mutated[place:end]
            case 3:
                mutated[place:place] = mutated[place:end]
            case 4:
                mutated[place:place] = rng.randbytes(rng.randint(1, 9))
            case 5:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                mutated[place:end] = other[start : start + rng.randint(1, 64)]
            case 6:
                # A length field made larger or smaller: the kind of lie a trusting reader believes.
                value = rng.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 1)).to_bytes(4, "big")
                mutated[place : place + 4] = value

    return bytes(mutated)


def fuzz(frames: int, seed: int) -> Counter[str]:
    """How many were read, and how many refused by each kind."""
    rng = random.Random(seed)
    good = seeds_of_frames()
    counts: Counter[str] = Counter()
    for number in range(frames):
        frame = mutate(rng.choice(good), good, rng)
        measured = number % MEASURED_EVERY == 0
        if measured:
            tracemalloc.start()
        try:
            counts[_outcome(frame)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, frame {number}: {error!r} for {frame.hex()}") from error
        finally:
            allocated = tracemalloc.get_traced_memory()[1] if measured else 0
            tracemalloc.stop()
        assert allocated < MOST_ALLOCATED, f"seed {seed}, frame {number}: {allocated} bytes for {frame.hex()}"

    return counts


def _outcome(frame: bytes) -> str:
    try:
        request = read_request(unpack(frame), RENAMES)
    except ProtocolError as error:
        assert error.kind in set(ErrorKind) and not any(secret in str(error) for secret in SECRETS)
        return error.kind

    assert request.observation.keys() <= {"images", "state", "task", "previous"}
    return "read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    started = time.perf_counter()
    counts = fuzz(given.frames, given.seed)
    seconds = time.perf_counter() - started
    said = ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
    print(f"{given.frames:,} frames of seed {given.seed} in {seconds:.0f} s: {said}")


if __name__ == "__main__":
    main()
