"""`insula bench-serve`: robots that do nothing but ask, and how long they wait."""

import asyncio
import dataclasses
import os
import ssl
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.table import Table
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException

from insula.checks import check_integer, check_number
from insula.client.connection import KEY_VARIABLE, REPLY_LIMITS, as_error, authorization, read_reply
from insula.client.protocol import check_metadata, pack, read_error, unpack
from insula.errors import InputError, InsulaError, ProtocolError, ServerError
from insula.files import check_output_file, write_json
from insula.terminal import as_text

PERCENTILES = (50, 90, 99)
WARM_UP_S = 1.0
REPLY_S = 30.0
"""Longer than this for one reply is an error."""
LARGEST_SIDE = 1024
OBSERVATIONS = 16
"""Different ones, sent in turn: to make a new one each time would time this program."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Ask a running policy server as several robots at once, each again as soon as it is answered. Prints round trips,
    what of them the policy took, and requests a second. Exit code 1 where a request failed. Raises InputError for
    values that cannot be."""

    url: tyro.conf.Positional[str] = "ws://127.0.0.1:8000"
    robots: tuple[int, ...] = (1, 8)
    """Robots at once, a measurement for each number."""
    seconds: float = 10.0
    """Of each measurement, after a second that is not counted."""
    image_size: int | None = None
    """Pixels of a picture's side; the model's own unless given."""
    task: str = "put the red block in the blue bowl"
    certificate: Path | None = None
    """Certificates to trust, for wss://. The API key is the environment's INSULA_API_KEY."""
    json: Path | None = None
    """Write the figures to this .json file."""

    def __post_init__(self) -> None:
        for count in self.robots:
            check_integer("robots", count, 1, 1024)
        if not self.robots:
            raise InputError("robots is empty, expected numbers of robots such as 1 8")
        check_number("seconds", self.seconds, "> 0", lambda seconds: seconds > 0)
        if self.image_size is not None:
            check_integer("image_size", self.image_size, 1, LARGEST_SIDE)


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one measurement; times in milliseconds, by percentile. `overhead`: a round trip less what the policy took."""

    robots: int
    requests: int
    errors: int
    first_error: str
    """Why the first of them was refused, in the server's words."""
    per_second: float
    round_trip: dict[str, float]
    infer: dict[str, float]
    overhead: dict[str, float]
    mean_batch: float


def run_bench(config: BenchConfig) -> int:
    """Measure, print a table, and return the exit code. Raises ServerError where no server answers, InputError or
    FileError for a file that cannot be written, before anything is measured."""
    if config.json is not None:
        check_output_file(config.json, (".json",), "json")

    figures = [asyncio.run(measure(config, robots)) for robots in config.robots]
    print(summary(figures))
    for one in figures:
        if one.errors:
            print(f"{one.robots} robots, {one.errors} errors, the first: {one.first_error}")
    if config.json is not None:
        write_json(config.json, {"url": config.url, "measured": [dataclasses.asdict(one) for one in figures]})

    return 1 if any(one.errors or not one.requests for one in figures) else 0


async def measure(config: BenchConfig, robots: int) -> Figures:
    """Figures of so many robots at once. Raises ServerError where one cannot connect, ProtocolError where the other
    side is no policy server or wants another key, InputError where the address is none."""
    until = time.perf_counter() + WARM_UP_S + config.seconds
    tasks = [asyncio.create_task(_ask(config, number, until)) for number in range(robots)]
    try:
        asked = [row for rows in await asyncio.gather(*tasks) for row in rows]
    except InvalidURI:
        raise InputError(f"{config.url}: no address of a server, expected such as ws://127.0.0.1:8000") from None
    except InvalidHandshake as error:
        raise as_error(config.url, error) from None
    except (OSError, TimeoutError, ValueError, WebSocketException) as error:
        if isinstance(error, InsulaError):
            raise
        raise ServerError(f"{config.url}: cannot be reached ({error or 'no answer'})") from None

    # By the end of each: the first second is for connecting, and for batches to find their rhythm.
    counted = [row for row in asked if row["done"] >= until - config.seconds]
    good = [row for row in counted if not row["error"]]
    columns = {name: np.array([row[name] for row in good]) for name in ("round_trip", "infer", "batch")}

    return Figures(
        robots=robots,
        requests=len(good),
        errors=len(counted) - len(good),
        first_error=next((row["error"] for row in counted if row["error"]), ""),
        per_second=len(good) / config.seconds,
        round_trip=_percentiles(columns["round_trip"]),
        infer=_percentiles(columns["infer"]),
        overhead=_percentiles(columns["round_trip"] - columns["infer"]),
        mean_batch=float(columns["batch"].mean()) if good else 0.0,
    )


async def _ask(config: BenchConfig, number: int, until: float) -> list[dict[str, Any]]:
    """One robot: a row for every request. It stops where its connection is lost, with a row that says so."""
    headers = authorization(os.environ.get(KEY_VARIABLE))
    settings: dict[str, Any] = (
        {"ssl": ssl.create_default_context(cafile=config.certificate)} if config.certificate else {}
    )

    rows: list[dict[str, Any]] = []
    async with connect(
        config.url, compression=None, max_size=REPLY_LIMITS.message, additional_headers=headers, proxy=None, **settings
    ) as connection:
        told = unpack(await _received(connection))
        check_metadata(told)
        frames = observations(told, config, number)
        while (sent := time.perf_counter()) < until:
            try:
                await connection.send(frames[len(rows) % len(frames)])
                answer = await _received(connection)
            except (WebSocketException, TimeoutError) as error:
                rows.append({"done": time.perf_counter(), "error": f"connection lost ({error})"})
                break

            done = time.perf_counter()
            rows.append(_row(answer, sent, done))

    return rows


async def _received(connection: ClientConnection) -> bytes | str:
    async with asyncio.timeout(REPLY_S):
        return await connection.recv()


def _row(answer: bytes | str, sent: float, done: float) -> dict[str, Any]:
    try:
        if isinstance(answer, str):
            raise ProtocolError(*read_error(answer))
        reply = read_reply(unpack(answer), (done - sent) * 1000)
    except ProtocolError as error:
        return {"done": done, "error": str(error)}

    server = reply.raw.get("server_timing")
    batch = server.get("batch", 1) if isinstance(server, dict) else 1
    infer = float("nan") if reply.infer_ms is None else reply.infer_ms
    return {"done": done, "error": "", "round_trip": reply.round_trip_ms, "infer": infer, "batch": batch}


def observations(metadata: dict[str, Any], config: BenchConfig, number: int) -> list[bytes]:
    """Messages of what the server's robot might see: noise, which no server can have seen before. Raises ServerError
    for a server that does not say what its policy looks at."""
    try:
        cameras, side, dim = metadata["cameras"], config.image_size or metadata["image_size"], metadata["state_dim"]
    except KeyError as error:
        raise ServerError(f"{config.url}: its metadata have no {error}; this benchmark is for insula serve") from None
    if not side <= LARGEST_SIDE:
        raise ServerError(f"{config.url}: wants pictures of {side} pixels, at most {LARGEST_SIDE} are made here")

    rng = np.random.default_rng(number)
    return [
        pack(
            {
                "images": {name: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for name in cameras},
                "state": rng.normal(0, 0.1, dim).astype(np.float32),
                "task": config.task,
            }
        )
        for _ in range(OBSERVATIONS)
    ]


def summary(figures: list[Figures]) -> str:
    """A table, as plain text."""
    table = Table(
        *("robots", "requests", "errors", "a second", "batch", "round trip p50", "p90", "p99"),
        *("policy p50", "overhead p50", "p99"),
        title="milliseconds",
        title_justify="left",
    )
    for one in figures:
        trip = [f"{one.round_trip[name]:.1f}" for name in ("p50", "p90", "p99")]
        rest = [f"{value:.2f}" for value in (one.infer["p50"], one.overhead["p50"], one.overhead["p99"])]
        counts = (str(one.robots), str(one.requests), str(one.errors), f"{one.per_second:.1f}", f"{one.mean_batch:.1f}")
        table.add_row(*counts, *trip, *rest)

    return as_text(table, width=120)


def _percentiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {f"p{p}": float("nan") for p in PERCENTILES}

    found = np.percentile(values, PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}
