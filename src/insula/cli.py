"""`insula COMMAND`: thin commands over the package."""

import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro
from rich.console import Console

if TYPE_CHECKING:
    from insula.model.config import ModelConfig

T = TypeVar("T")
HUGE_PAGES = "glibc.malloc.hugetlb=1"
console = Console(stderr=True)


def main() -> None:
    """Run one command. An error the user can mend is one line and exit code 1; INSULA_DEBUG=1 shows where it arose."""
    _use_huge_pages()
    logging.basicConfig(level=logging.WARNING, format="insula: %(message)s")
    warnings.formatwarning = lambda message, *_: f"insula: {message}\n"
    commands: dict[str, Callable[..., Any]] = {
        "collect": collect,
        "questions": questions,
        "pretrain": pretrain,
        "train": train,
        "evaluate": evaluate,
        "inspect": inspect,
        "convert": convert,
        "demo": demo,
        "data": data,
    }
    try:
        if sys.argv[1:2] in (["train"], ["inspect"], ["data"]):  # --preset chooses the defaults of all other flags
            return commands[sys.argv[1]](*sys.argv[2:])
        tyro.extras.subcommand_cli_from_dict(commands, prog="insula", description=__doc__)
    except KeyboardInterrupt as error:
        console.print(f"insula: {error.args[0] if error.args else 'interrupted'}", markup=False, highlight=False)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, LookupError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("INSULA_DEBUG"):
            raise
        message = error.args[0] if isinstance(error, KeyError) else error
        console.print(f"insula: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _use_huge_pages() -> None:
    """XLA:CPU allocates its buffers anew each step; huge pages make that much cheaper, but glibc reads the setting
    only when a process starts. So start again, once."""
    known = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "hugetlb" not in known:
        os.environ["GLIBC_TUNABLES"] = f"{known}:{HUGE_PAGES}" if known else HUGE_PAGES
        os.execv(sys.executable, [sys.executable, "-m", "insula", *sys.argv[1:]])


def collect(out: Path, episodes: int = 400, first_seed: int = 0, noise: float = 0.3, overwrite: bool = False) -> None:
    """Write demonstrations of the tabletop's scripted expert as a LeRobot v3.0 data set.

    Args:
        out: Folder of the new data set.
        episodes: Successful demonstrations to write.
        first_seed: Scene seeds count up from here.
        noise: DART noise on the executed moves; the clean action is recorded.
        overwrite: Replace what is in `out`.
    """
    from insula.collect.demonstrations import collect as run

    done = run(out, episodes, first_seed, noise, overwrite=overwrite)
    print(f"{len(done.seeds)} demonstrations, {done.frames} frames, {len(done.discarded)} discarded: {done.root}")


def questions(out: Path, scenes: int = 1500, each: int = 8, overwrite: bool = False) -> None:
    """Write questions about rendered tabletop scenes, with answers: vision-language samples to mix into training.

    Args:
        out: Folder for questions.jsonl and images.
        scenes: Scenes to render.
        each: Questions about each.
        overwrite: Replace what is in `out`.
    """
    from insula.collect.demonstrations import collect_questions

    print(f"{collect_questions(out, scenes, each, overwrite=overwrite)} questions about {scenes} scenes: {out}")


def pretrain(out: Path, steps: int | None = None, scenes: int | None = None, seed: int = 0) -> None:
    """Train the small backbone on questions about rendered scenes, without robot actions.

    Args:
        out: Folder for backbone.safetensors and backbone.json.
        steps: Updates; the shipped backbone's number unless given.
        scenes: Rendered scenes; the shipped backbone's number unless given.
        seed: Of initial weights and sampling.
    """
    from insula.pretrain.run import PretrainConfig, question_tokenizer
    from insula.pretrain.run import pretrain as run

    config = PretrainConfig(out, seed=seed)
    config = dataclasses.replace(config, steps=steps or config.steps, scenes=scenes or config.scenes)
    known = run(config, question_tokenizer(config.model))
    print(
        f"held-out accuracy {known.mean:.1%} over {len(known.accuracy)} kinds, "
        f"locations {known.location_error:.2f} bins of 128 off: {out}"
    )


def evaluate(
    run: tyro.conf.Positional[Path],
    episodes: int = 100,
    first_seed: int | None = None,
    replan_steps: int = 2,
    json: Path | None = None,
    video: Path | None = None,
    robot: str | None = None,
) -> None:
    """Run a trained policy in closed loop in the tabletop: success, wrong objects, and swapped instructions.

    Args:
        run: Folder that `insula train` wrote.
        episodes: Scenes; each is tried with its instruction and with another one.
        first_seed: Scenes count up from here; the first evaluation seed unless given.
        replan_steps: Steps of each chunk to execute before the policy looks again.
        json: Write the results to this file.
        video: Write the first episodes to this .mp4 or .gif.
        robot: Which one to act for, where the run was trained on several.
    """
    from insula.evaluate.command import evaluate_run

    print(evaluate_run(run, episodes, first_seed, replan_steps, json, video, robot))


def inspect(*arguments: str) -> None:
    """See one sample as a model does: every token and mask, who may look at whom, what each loss scores, and, measured,
    where gradients go. Writes one offline page. Exit code 1 where insulation leaks or nothing is shown."""
    from insula.inspection.inspect_command import inspect as run
    from insula.inspection.inspect_config import InspectConfig

    config = _parsed("inspect", inspect.__doc__, arguments, lambda model: InspectConfig(model=model))
    sys.exit(0 if run(config) else 1)


def train(*arguments: str) -> None:
    """Train a knowledge-insulated policy on a LeRobot data set. --preset NAME chooses the model that flags override."""
    from insula.train.config import TrainConfig
    from insula.train.run import train as run

    def default(model: "ModelConfig") -> TrainConfig:
        return TrainConfig(run=tyro.MISSING, model=model.with_compute(dtype="bfloat16"))

    config = _parsed("train", train.__doc__, arguments, default)
    complete = run(config)
    state = "done" if complete else "interrupted; go on with: insula train --resume --run"
    print(f"{state} {config.run}")
    sys.exit(0 if complete else 130)


def _parsed(command: str, about: str | None, arguments: Sequence[str], default: "Callable[[ModelConfig], T]") -> T:
    """Flags over `default` of the model that --preset names, in any order, before or after model.lora:lora-config."""
    from insula.model.config import preset

    name, rest = "tiny", list(arguments)
    if "--preset" in rest[:-1]:
        at = rest.index("--preset")
        name = rest[at + 1]
        del rest[at : at + 2]
    made = default(preset(name))
    cascade = (tyro.conf.CascadeSubcommandArgs,)
    return tyro.cli(type(made), prog=f"insula {command}", description=about, default=made, args=rest, config=cascade)


def convert(
    source: tyro.conf.Positional[Path],
    destination: tyro.conf.Positional[Path],
    to: Literal["insula", "lerobot", "openpi"],
    preset: str = "pi05",
    dtype: Literal["float32", "bfloat16"] = "float32",
    ignore: tuple[str, ...] = (),
    norm_stats: Path | None = None,
    robot: str | None = None,
) -> None:
    """Turn a run or a checkpoint (ours, PaliGemma, openpi, LeRobot PI05) into another format, array by array.

    Args:
        source: A run, a directory, a .safetensors or a .npz file, or hf://organization/name.
        destination: A new directory.
        to: What to write.
        preset: What a source that carries no config is: pi05, pi0, ...
        dtype: Of the weights written.
        ignore: Patterns of tensors in the source that may be left over.
        norm_stats: openpi's norm_stats.json, where the source has no statistics.
        robot: Whose statistics to write, where the run was trained on several.
    """
    from insula.convert import convert as run

    print(run(source, destination, to, preset, dtype, ignore, norm_stats, robot).summary())


def data(*arguments: str) -> None:
    """Look after a LeRobot data set: insula data COMMAND --help."""
    commands: dict[str, Callable[..., Any]] = {
        "describe": data_describe,
        "stats": data_stats,
        "fit-fast": data_fit_fast,
        "convert": data_convert,
        "doctor": data_doctor,
    }
    description = "Look after a LeRobot data set."
    tyro.extras.subcommand_cli_from_dict(commands, prog="insula data", description=description, args=list(arguments))


def data_describe(path: tyro.conf.Positional[Path], preset: str = "tiny") -> None:
    """Print a mapping for a data set, to be corrected and given to insula train --data.

    Args:
        path: A LeRobot data set (v2.1 or v3.0).
        preset: Whose cameras to find.
    """
    from insula.data.describe import describe
    from insula.model.config import preset as named

    print(describe(path, named(preset).cameras), end="")


def data_stats(
    path: tyro.conf.Positional[Path],
    out: Path | None = None,
    horizon: int = 16,
    chunks: int = 200_000,
    processes: int = 2,
) -> None:
    """Statistics of state and actions over all episodes, quantiles exact.

    Args:
        path: A LeRobot data set, or a .toml mapping.
        out: Write norm_stats.json: a .json file, or a folder for a mapping of several robots.
        horizon: Steps of a chunk, where the mapping names none.
        chunks: Spread evenly over all episodes, to count clipped values in.
        processes: To share the data files between.
    """
    from insula.data.command import stats

    print(stats(path, horizon, out, chunks, processes))


def data_fit_fast(
    path: tyro.conf.Positional[Path],
    out: Path,
    vocab: int = 1024,
    scale: float = 10.0,
    preset: str = "tiny",
    horizon: int | None = None,
    chunks: int = 200_000,
    processes: int = 2,
) -> None:
    """Fit a FAST tokenizer on chunks of all episodes, for insula train --fast, with a report.

    Args:
        path: A LeRobot data set, or a .toml mapping.
        out: Folder for the tokenizer and report.json.
        vocab: Entries.
        scale: Of the DCT coefficients before rounding: larger is finer and longer.
        preset: Whose horizon and token budget count.
        horizon: Steps of a chunk; the preset's unless given.
        chunks: Spread evenly over all episodes of each robot.
        processes: To share the work between.
    """
    from insula.data.command import fit_fast
    from insula.model.config import preset as named

    model = named(preset)
    steps = horizon or model.horizon
    print(fit_fast(path, steps, model.max_fast_len, out, vocab, scale, chunks, processes))


def data_convert(
    source: tyro.conf.Positional[Path], destination: tyro.conf.Positional[Path], overwrite: bool = False
) -> None:
    """Write a data set (v2.1) anew as v3.0: the same rows and pictures, true global statistics.

    Args:
        source: A LeRobot data set.
        destination: A new folder.
        overwrite: Replace what is there.
    """
    from insula.data.lerobot.conversion import convert as run

    done = run(source, destination, overwrite=overwrite)
    print(f"{len(done.episodes)} episodes, {len(done)} frames, {done.info.codebase_version}: {destination}")


def data_doctor(path: tyro.conf.Positional[Path], json: bool = False, quick: bool = False) -> None:
    """Find everything that is wrong with a data set. Exit code 0: sound; 1: faults were found.

    Args:
        path: A LeRobot data set (v2.1 or v3.0).
        json: Print the faults as JSON.
        quick: Decode three pictures of each episode and camera rather than all.
    """
    from json import dumps

    from insula.data.lerobot.doctor import examine

    found = examine(path, every_frame=not quick)
    if json:
        print(dumps([finding.to_json() for finding in found], indent=1))
    else:
        print("\n".join(map(str, found)) if found else f"{path}: sound")
    sys.exit(1 if found else 0)


def demo(out: Path | None = None, quick: bool = False, seed: int = 0) -> None:
    """Demonstrations, FAST, training, evaluation on unseen scenes, one report.html. Resumes where it was interrupted.

    Args:
        out: Folder for everything; runs/demo, or runs/quick with --quick.
        quick: The same path in about two minutes, for a smoke test; it learns next to nothing.
        seed: Of training. Scenes do not depend on it.
    """
    from insula.demo import DEMO, QUICK
    from insula.demo import demo as run

    print(f"report: {run(out or Path('runs/quick' if quick else 'runs/demo'), QUICK if quick else DEMO, seed)}")
