"""`insula COMMAND`: a table of commands. Each is a frozen config, whose fields are its flags, and what runs it.

Exit codes:

    0    done
    1    an error that can be mended (one line), what was asked about is not as it should be (`data doctor`, `inspect`,
         `plan`, a cell of `compare`, a request of `bench-serve`), or a bug of ours (a traceback)
    2    the command line cannot be understood
    75   of several processes another was lost; 134: process 0 was, in JAX's own words
    130  interrupted by Ctrl-C, SIGTERM or SIGHUP; what says so can go on
"""

import argparse
import dataclasses
import errno
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import tyro
from rich.console import Console

from insula.errors import InsulaError, did_you_mean

HUGE_PAGES = "glibc.malloc.hugetlb=1"  # madvise: the kernel gives huge pages where it has some, else the usual ones
console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Command:
    """Where a command lives; loaded when it is asked for, so that `insula collect` need not wait for JAX.

    `module` has the dataclass `config` and the function `run(config)`, which returns an exit code, or None for 0.
    `default(preset, arguments)`, where given, makes the config that flags change.
    """

    about: str
    module: str
    config: str
    run: str
    default: str | None = None


COMMANDS = {
    "collect": Command(
        "demonstrations of the tabletop's scripted expert, as a LeRobot data set",
        "insula.collect.command",
        "CollectConfig",
        "run_collect",
    ),
    "questions": Command(
        "questions about rendered scenes, with answers", "insula.collect.command", "QuestionsConfig", "run_questions"
    ),
    "data describe": Command(
        "a mapping for a data set, to be corrected", "insula.train.prepare", "DescribeConfig", "run_describe"
    ),
    "data doctor": Command(
        "everything that is wrong with a data set", "insula.data.lerobot.command", "DoctorConfig", "run_doctor"
    ),
    "data stats": Command("statistics of state and actions", "insula.train.prepare", "StatsConfig", "run_stats"),
    "data fit-fast": Command(
        "a FAST tokenizer for these actions, with a report", "insula.train.prepare", "FitFastConfig", "run_fit_fast"
    ),
    "data convert": Command(
        "a data set as LeRobot v3.0", "insula.data.lerobot.command", "DataConvertConfig", "run_data_convert"
    ),
    "pretrain": Command(
        "the small backbone, from questions alone", "insula.pretrain.run", "PretrainConfig", "run_pretrain"
    ),
    "train": Command(
        "a knowledge-insulated policy", "insula.train.command", "TrainConfig", "run_train", default="train_defaults"
    ),
    "recipes": Command("ways to join tokens and flow, by name", "insula.recipes", "RecipesConfig", "run_recipes"),
    "compare": Command(
        "recipes, seeds and amounts of data of a study", "insula.study.compare", "CompareConfig", "run_compare"
    ),
    "plan": Command(
        "what training on some devices would need",
        "insula.train.plan",
        "PlanConfig",
        "run_plan",
        default="plan_defaults",
    ),
    "evaluate": Command("a trained policy in closed loop", "insula.evaluate.command", "EvaluateConfig", "run_evaluate"),
    "ask": Command("a trained policy about pictures, in words", "insula.policy.command", "AskConfig", "run_ask"),
    "serve": Command(
        "a trained policy for robots, over openpi's protocol", "insula.serve.command", "ServeConfig", "run_serve"
    ),
    "bench-serve": Command(
        "how fast a policy server answers several robots", "insula.serve.bench", "BenchConfig", "run_bench"
    ),
    "replay": Command(
        "what a robot's loop saw, did and waited for, as a page", "insula.report.replay", "ReplayConfig", "run_replay"
    ),
    "inspect": Command(
        "one sample as a model sees it, and where gradients go",
        "insula.inspection.command",
        "InspectConfig",
        "run_inspect",
        default="inspect_defaults",
    ),
    "convert": Command("a checkpoint into another format", "insula.convert", "ConvertConfig", "run_convert"),
    "demo": Command("all of it, to one report.html", "insula.demo", "DemoConfig", "run_demo"),
}

# What an OSError says of a disk, a path or a limit rather than of our code. By name, as some systems lack some.
_OF_THE_MACHINE = {
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "ENAMETOOLONG", "ELOOP", "EISDIR", "ENOTDIR"),
        *("EEXIST", "ENOENT", "EIO", "ESTALE", "EMFILE", "ENFILE"),
    )
}


def main() -> None:
    """Run the command of this process, and exit with its code."""
    _use_huge_pages()  # first: it starts the process again, and what ran before it would run twice
    logging.basicConfig(level=logging.WARNING, format="insula: %(message)s")
    warnings.formatwarning = lambda message, *_: f"insula: {message}\n"
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. An error the user can mend is one line, where INSULA_DEBUG=1 does not
    ask for all of it; any other error is ours, and is shown as such."""
    try:
        return _run(list(arguments))
    except KeyboardInterrupt as error:  # ours carry a sentence that says how to go on; Python's carry nothing
        _say(str(error.args[0]) if error.args else "interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        # Python flushes stdout when it exits, and would complain of the same pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = _mendable(error)
        if message is None:
            traceback.print_exc()
            command = " ".join(["insula", *arguments])
            _say(
                f"this is a bug in insula {version('insula')}, not in what you did; please report the traceback above "
                f"and the command: {command}",
                style="red",
            )
        elif os.environ.get("INSULA_DEBUG"):
            traceback.print_exc()
        else:
            _say(message, style="red")
        return 1


def _run(arguments: list[str]) -> int:
    name, rest = _named(arguments)
    _check_once(name, rest)
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    kind, default = getattr(module, command.config), None
    if command.default is not None:
        preset, rest = _preset(name, rest)  # tyro must not see it: it is no field
        default = getattr(module, command.default)(preset, rest)

    optional: dict[str, Any] = {} if default is None else {"default": default}
    # Flags before or after model.lora:lora-config; an enum's words as they are written elsewhere.
    style = (tyro.conf.CascadeSubcommandArgs, tyro.conf.EnumChoicesFromValues)
    config = tyro.cli(kind, prog=f"insula {name}", args=rest, config=style, **optional)
    return getattr(module, command.run)(config) or 0


def _named(arguments: list[str]) -> tuple[str, list[str]]:
    """The command that is asked for, and its flags. Exits with an overview, or with code 2 where there is none."""
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name, arguments[words:]

    # Not a command. `insula data` alone is the first word of several, so that help and hints are about these.
    group = arguments[0] if arguments and any(name.startswith(f"{arguments[0]} ") for name in COMMANDS) else None
    asked = arguments[1:] if group else arguments
    if arguments[:1] == ["--version"]:
        print(f"insula {version('insula')}")
        sys.exit(0)
    if asked[:1] in (["-h"], ["--help"]):
        print(_overview(group))
        sys.exit(0)

    if asked:
        known = [name.removeprefix(f"{group} ") for name in COMMANDS if not group or name.startswith(f"{group} ")]
        name = f"{group} {asked[0]}" if group else asked[0]
        _say(f"no command {name!r}{did_you_mean(asked[0], known)}; known: {', '.join(known)}", "red")
    else:
        print(_overview(group), file=sys.stderr)

    sys.exit(2)


def _check_once(name: str, arguments: list[str]) -> None:
    """Exits with code 2 where a flag is given twice: tyro would take the last in silence, of a list as well."""
    flags = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            _say(f"{name}: {flag} is given twice; give it once, several values behind it: {flag} ONE OTHER", "red")
            sys.exit(2)


def _overview(group: str | None) -> str:
    shown = {name: command for name, command in COMMANDS.items() if not group or name.startswith(f"{group} ")}
    lines = [f"  {name:<14} {command.about}" for name, command in shown.items()]

    return "\n".join(["usage: insula COMMAND [FLAGS]; insula COMMAND --help lists its flags", "", *lines])


def _preset(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """--preset NAME chooses the defaults of all other flags, so it is read before them."""
    parser = argparse.ArgumentParser(f"insula {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    found, rest = parser.parse_known_args(arguments)

    return found.preset, rest


def _mendable(error: Exception) -> str | None:
    """What to say of an error that something outside this package can mend; None for a bug of ours."""
    if isinstance(error, InsulaError):
        return str(error)

    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE and error.filename is not None:
        paths = " → ".join(str(path) for path in (error.filename, error.filename2) if path is not None)
        return f"{paths}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE):
        return f"{error.strerror}; make room where the results are written"  # a write that fails knows no name

    # JAX says so in a RuntimeError of its own; it is not imported here.
    exhausted = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)
    if exhausted or isinstance(error, MemoryError):
        first = str(error).splitlines()[0] if str(error) else "no memory is left"  # XLA adds a table of its buffers
        return f"out of memory: {first}; ask for less at once, such as a smaller --batch-size"
    return None


def _say(text: str, style: str | None = None) -> None:
    console.print(f"insula: {text}", style=style, markup=False, highlight=False, soft_wrap=True)


def _use_huge_pages() -> None:
    """XLA:CPU allocates its temporary buffers again each step, and the kernel hands them out page by page. With huge
    pages a train step took 327 to 368 ms instead of 412; no flag of XLA made a difference. glibc reads the setting only
    when a process starts, so start again, once."""
    known = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "hugetlb" not in known:  # it is there after the restart, or was chosen: hugetlb=0
        os.environ["GLIBC_TUNABLES"] = f"{known}:{HUGE_PAGES}" if known else HUGE_PAGES
        os.execv(sys.executable, [sys.executable, "-m", "insula", *sys.argv[1:]])
