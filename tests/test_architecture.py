"""The plan of the house: who may import whom, and what appears in one place or nowhere.

Everything is read from the syntax tree, so comments and docstrings may say what they like. Every checker is a function
from one module's source to its findings, and is shown to find a planted fault.
"""

import ast
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from insula.tokens.masks import make_attn_mask

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "insula"

# Each room, and what it may import besides itself. A room stands after all it imports: left never imports right. Those
# not built yet (study) have their place, so that no arrow will run back.
GROUND = {"errors", "checks", "files", "ports", "shapes", "batch", "flow", "letterbox"}
MODEL = GROUND | {"tokens", "model"}
RUNS = MODEL | {"losses", "data", "checkpoints", "runs"}
POLICY = RUNS | {"decode", "policy"}
TRAIN = RUNS | {"certificate", "parallel", "recipes", "train"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "checks": {"errors"},
    "files": {"errors"},
    "terminal": set(),
    "ports": {"errors"},
    "compile": set(),
    "page": {"errors"},
    "shapes": {"errors"},
    "letterbox": set(),
    "batch": {"errors", "shapes"},
    "flow": {"errors", "shapes"},
    "tokens": GROUND,
    "model": GROUND | {"tokens"},
    "losses": MODEL,
    "recipes": MODEL | {"terminal"},
    "testing": MODEL,
    "decode": MODEL,
    "data": GROUND | {"tokens", "terminal"},
    "checkpoints": MODEL,
    "runs": MODEL | {"data", "checkpoints"},
    "certificate": MODEL | {"losses", "compile"},
    "worlds": {"errors"},
    "client": {"errors"},  # a robot's side: never JAX
    "parallel": MODEL,
    "collect": MODEL | {"data", "worlds"},
    "train": TRAIN,
    "policy": POLICY,
    "convert": POLICY,
    "evaluate": POLICY | {"terminal", "client", "collect", "worlds"},
    "pretrain": TRAIN | {"worlds", "collect", "evaluate"},
    "inspection": TRAIN | POLICY | {"terminal", "page", "testing", "compile"},
    "serve": POLICY | {"certificate", "client", "page", "terminal"},
    "report": TRAIN | POLICY | {"page", "evaluate", "inspection", "client", "terminal"},
    "demo": TRAIN | POLICY | {"worlds", "collect", "pretrain", "evaluate", "inspection", "report"},
}
ROOMS["study"] = set(ROOMS) - {"demo"}
ROOMS["__init__"] = set(ROOMS)  # the entry points, re-exported
ROOMS["cli"] = set(ROOMS)
ROOMS["__main__"] = {"cli"}

WITHOUT_JAX = {"client", "worlds", "errors", "checks", "files", "ports", "terminal", "cli", "__main__"}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_BUILTINS = {"eval", "exec"}
UNSAFE_OPTIONS = {"allow_pickle", "trust_remote_code"}


def sources() -> list[tuple[str, str]]:
    """(dotted module name, source) of every file in the package."""
    named = []
    for path in sorted(PACKAGE.rglob("*.py")):
        dotted = ".".join(("insula", *path.relative_to(PACKAGE).with_suffix("").parts))
        named.append((dotted, path.read_text(encoding="utf-8")))
    return named


def room(module: str) -> str:
    """`insula.tokens.fast` → `tokens`; the package itself → `__init__`."""
    return (*module.split("."), "__init__")[1]


def imports(module: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported: at the top, inside functions, relatively, or by name at run time."""
    for node in ast.walk(ast.parse(source, filename=module)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                above = module.split(".")[:-level] if level else []
                origin = ".".join([*above, *([base] if base else [])])
                yield from ((node.lineno, f"{origin}.{name.name}") for name in names)
            case ast.Call(func=ast.Name(id="__import__" | "import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield node.lineno, name
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield node.lineno, name


def wrong_way_imports(module: str, source: str) -> list[str]:
    """Imports against the table. `from insula import X` reaches room X if there is one, else the package itself."""
    here = room(module)
    if here not in ROOMS:
        return [f"{module}: no room {here!r} in the table; give it a place there"]
    found = []
    for line, name in imports(module, source):
        if name.split(".")[0] != "insula":
            continue
        there = room(name) if room(name) in ROOMS or (PACKAGE / room(name)).is_dir() else "__init__"
        if there not in ROOMS[here] | {here}:
            found.append(f"{module}:{line}: {here} imports {there} ({name})")
    return found


def torch_imports(module: str, source: str) -> list[str]:
    """PyTorch is an option for converting and parity only."""
    if room(module) == "checkpoints":
        return []
    return [
        f"{module}:{line}: imports {name}" for line, name in imports(module, source) if name.split(".")[0] == "torch"
    ]


def jax_imports(module: str, source: str) -> list[str]:
    """A robot's side, the worlds and the command line work without JAX: it takes seconds to import."""
    if room(module) not in WITHOUT_JAX:
        return []
    return [f"{module}:{line}: imports {name}" for line, name in imports(module, source) if name.split(".")[0] == "jax"]


def stopped_gradients(module: str, source: str) -> list[str]:
    """Every mention of `stop_gradient` in code: called, imported under any name, or looked up by string."""
    found = []
    for node in ast.walk(ast.parse(source, filename=module)):
        match node:
            case (
                ast.Attribute(attr="stop_gradient")
                | ast.Name(id="stop_gradient")
                | ast.alias(name="stop_gradient")
                | ast.Constant(value="stop_gradient")
            ):
                found.append(f"{module}:{node.lineno}: stop_gradient")
    return found


def unsafe_code(module: str, source: str) -> list[str]:
    """Whatever can run code hidden in data: unpickling, `torch.load`, `eval`, a hub's own Python."""
    found = [
        f"{module}:{line}: imports {name}"
        for line, name in imports(module, source)
        if name.split(".")[0] in UNSAFE_MODULES or name == "torch.load"
    ]
    for node in ast.walk(ast.parse(source, filename=module)):
        match node:
            case ast.Name(id=name) if name in UNSAFE_BUILTINS:
                found.append(f"{module}:{node.lineno}: {name}()")
            case ast.Attribute(value=ast.Name(id="builtins"), attr=name) if name in UNSAFE_BUILTINS:
                found.append(f"{module}:{node.lineno}: builtins.{name}()")
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                found.append(f"{module}:{node.lineno}: torch.load")
            case ast.keyword(arg=name, value=value) if name in UNSAFE_OPTIONS:
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(f"{module}:{node.value.lineno}: {name} is not False")
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and key.value in UNSAFE_OPTIONS:
                        found.append(f"{module}:{value.lineno}: {key.value} among options")
    return found


def everywhere(checker: Callable[[str, str], list[str]]) -> list[str]:
    return [finding for module, source in sources() for finding in checker(module, source)]


def test_the_package_is_read() -> None:
    """The control of all below: an empty walk would pass everything."""
    assert {"insula.batch", "insula.flow", "insula.model.config"} <= {module for module, _ in sources()}


def test_rooms_stand_after_what_they_import() -> None:
    order = list(ROOMS)
    for position, (name, allowed) in enumerate(ROOMS.items()):
        assert not {one for one in allowed - {name} if order.index(one) >= position}, name
    assert ROOMS["worlds"] == {"errors"}


def test_imports_go_one_way() -> None:
    assert everywhere(wrong_way_imports) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("insula.tokens.fast", "import insula.model.layers"),
        ("insula.tokens.fast", "from insula.model import layers"),
        ("insula.tokens.fast", "from insula import model"),
        ("insula.tokens.fast", "from ..model import layers"),
        ("insula.tokens.fast", "from .. import model"),
        ("insula.tokens.fast", "def f():\n    from insula.data import mapping"),
        ("insula.tokens.fast", "import importlib\nimportlib.import_module('insula.train')"),
        ("insula.losses", "from insula import compute_loss"),
        ("insula.model.expert", "from insula.losses import flow_matching_loss"),
        ("insula.worlds.tabletop.environment", "from insula.shapes import Float"),
        ("insula.train.loop", "from insula.cli import main"),
        ("insula.attic", ""),
    ],
)
def test_a_wrong_way_import_is_found(module: str, source: str) -> None:
    assert wrong_way_imports(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("insula.tokens.fast", "import scipy\nfrom insula.errors import did_you_mean\nfrom insula.tokens import masks"),
        ("insula.tokens.fast", "from . import masks\nfrom .masks import positions\nfrom ..shapes import Array"),
        ("insula.worlds.tabletop.environment", "from insula.worlds.seeds import EVALUATION"),
        ("insula.cli", "from insula import evaluate, train\nimport insula.worlds.tabletop"),
    ],
)
def test_a_right_way_import_is_not(module: str, source: str) -> None:
    assert wrong_way_imports(module, source) == []


def test_gradients_stop_in_one_file() -> None:
    files = {module for module, source in sources() if stopped_gradients(module, source)}
    assert files <= {"insula.model.insulation"}
    assert files or not (PACKAGE / "model" / "insulation.py").exists()


@pytest.mark.parametrize(
    "source",
    [
        "import jax\njax.lax.stop_gradient(1.0)",
        "from jax.lax import stop_gradient as detach",
        "stop_gradient(x)",
        "getattr(lax, 'stop_gradient')(x)",
    ],
)
def test_a_stopped_gradient_is_found(source: str) -> None:
    assert stopped_gradients("insula.losses", source)
    assert not stopped_gradients("insula.losses", '"""Here no stop_gradient is needed."""  # stop_gradient')


def test_nothing_runs_code_from_data() -> None:
    assert everywhere(unsafe_code) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "run = eval",
        "import builtins\nbuiltins.exec('1')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=unsafe)",
        "load('x', trust_remote_code=True)",
        "load('x', **{'trust_remote_code': True})",
    ],
)
def test_unsafe_code_is_found(source: str) -> None:
    assert unsafe_code("insula.data.lerobot.info", source)


def test_safe_code_is_not() -> None:
    safe = "import numpy as np\nnp.load('x', allow_pickle=False)\nmodel.eval()\n'never pickle, eval or torch.load'"
    assert unsafe_code("insula.data.lerobot.info", safe) == []


def test_torch_stays_in_checkpoints() -> None:
    assert everywhere(torch_imports) == []


def test_torch_elsewhere_is_found() -> None:
    source = "def convert():\n    import torch.nn as nn"
    assert torch_imports("insula.model.layers", source)
    assert not torch_imports("insula.checkpoints.lerobot", source)


def test_jax_stays_out_of_rooms_that_do_without() -> None:
    assert everywhere(jax_imports) == []


def test_jax_there_is_found() -> None:
    source = "def act():\n    from jax import numpy"
    assert jax_imports("insula.client.protocol", source)
    assert not jax_imports("insula.decode.flow", source)


def figures(folder: Path) -> subprocess.CompletedProcess[str]:
    script = PACKAGE.parents[1] / "scripts" / "figures.py"
    return subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)


def test_the_code_reads_as_it_should(tmp_path: Path) -> None:
    """Comments, blank lines, docstrings and more, by the script of `make figures`."""
    assert figures(PACKAGE).returncode == 0, figures(PACKAGE).stdout
    (tmp_path / "dense.py").write_text("def f(a):\n    b = a\n    return b\n")
    assert figures(tmp_path).returncode == 1  # the control


def test_annotations_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        make_attn_mask(jnp.ones((2, 3), bool), jnp.ones((2, 4), bool))


def test_our_own_errors_show_when_they_are_not(unchecked: None) -> None:
    with pytest.raises(ValueError, match="token_mask"):
        make_attn_mask(jnp.ones((2, 3), bool), jnp.ones((2, 4), bool))


def test_the_network_is_closed() -> None:
    with pytest.raises(ConnectionRefusedError, match="this machine"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(ConnectionRefusedError, match="this machine"):
        socket.getaddrinfo("example.org", 443)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()[:2]):
        pass
