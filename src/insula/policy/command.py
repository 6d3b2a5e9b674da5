"""What `insula ask` does."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from insula.checks import check_integer, check_seed
from insula.data.images import decode_any
from insula.decode.tokens import Sampling
from insula.errors import InputError
from insula.files import read_bytes
from insula.policy.acting import Policy
from insula.policy.speaking import Speaker
from insula.tokens.grammar import Grammar, any_of

PICTURE_LIMIT = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class AskConfig:
    """Ask the backbone of a trained policy about pictures. The answer goes to stdout; exit code 1 where it never ended.
    Raises InputError for values that cannot be."""

    run: tyro.conf.Positional[Path]
    """Folder that `insula train` wrote."""
    question: tyro.conf.Positional[str]
    """In the words of its training: "where is the red block"."""
    images: Annotated[tuple[str, ...], tyro.conf.arg(name="image")] = ()
    """Pictures (PNG, JPEG, WEBP) as CAMERA=FILE; a FILE alone is the model's first camera. Other cameras are masked."""
    one_of: tuple[str, ...] = ()
    """The only answers there are; free text unless given."""
    places: int | None = None
    """Answer with exactly this many location tokens: two say where something is in an image."""
    temperature: float | None = None
    """Draw the answer at this temperature, rather than taking the likeliest token each time."""
    top_k: int | None = None
    """Draw among so many of the likeliest tokens."""
    seed: int = 0
    """Of what is drawn."""
    step: int | None = None
    """Which checkpoint; the newest unless told."""
    robot: str | None = None
    """Which one's tokenizer speaks, where the run was trained on several."""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        if self.places is not None:
            check_integer("places", self.places, 1)
        if self.one_of and self.places is not None:
            raise InputError("expected one of --one-of and --places: either bounds the answer")
        if not self.question.strip():
            raise InputError("the question is empty")
        if self.sampling is None and self.seed:  # in this order: it also checks temperature and top_k
            raise InputError("--seed is for --temperature and --top-k: without them nothing is drawn")

    @property
    def sampling(self) -> Sampling | None:
        """None where the likeliest token is taken."""
        if self.temperature is None and self.top_k is None:
            return None

        return Sampling(1.0 if self.temperature is None else self.temperature, self.top_k)


def run_ask(config: AskConfig) -> None:
    """Print the answer. Raises MissingFileError, FileError, DatasetError or InputError for unusable pictures,
    TokenBudgetError for a question that is too long, DecodeError for no answer, and as `load_model`.
    """
    pictures = read_pictures(config.images)
    policy = Policy.load(config.run, config.step, config.seed, config.robot)
    speaker = Speaker(policy, config.sampling)
    images = {camera or speaker.policy.config.cameras[0]: picture[None] for camera, picture in pictures.items()}

    (said,) = speaker.ask(images, [config.question], grammar(speaker, config))
    print(said.check("the answer"))
    print(f"probability {said.probability:.3g}, {len(said.tokens)} tokens", file=sys.stderr)


def read_pictures(given: tuple[str, ...]) -> dict[str, np.ndarray]:
    """uint8 [h, w, 3] by camera, "" for one that is not named. Raises InputError where a camera is given twice."""
    pictures: dict[str, np.ndarray] = {}
    for entry in given:
        camera, named, path = entry.partition("=")
        camera, path = (camera, path) if named else ("", entry)
        if camera in pictures:
            raise InputError(f"--image {entry}: {camera or 'the first camera'} has a picture already; name the camera")
        pictures[camera] = decode_any(read_bytes(Path(path), PICTURE_LIMIT), path)

    return pictures


def grammar(speaker: Speaker, config: AskConfig) -> Grammar | None:
    """What may be answered; None for free text. Raises InputError where the tokenizer knows no places."""
    if config.one_of:
        return speaker.choose_from(config.one_of)
    if config.places is None:
        return None

    places = location_ids(speaker)
    return any_of(places, config.places, speaker.tokenizer.vocab_size, speaker.tokenizer.text.eos_id)


def location_ids(speaker: Speaker) -> list[int]:
    """The tokens <loc0000> upwards, as many as this tokenizer has. Raises InputError for none."""
    found: list[int] = []
    for number in range(1024):
        ids = speaker.tokenizer.text.encode(f"<loc{number:04d}>")
        if len(ids) != 1:
            break
        found += ids
    if not found:
        raise InputError("--places: this text tokenizer has no location tokens")

    return found
