"""What the documentation says is true: places exist, pages are listed, and code in the README is code that runs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "insula"
PLACE = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """`NAME`, `function`, `Class`, `Class.field` and `Class.method` of a module."""
    for node in body:
        match node:
            case ast.ClassDef(name=name, body=inner):
                yield prefix + name
                yield from definitions(inner, f"{prefix}{name}.")
            case ast.FunctionDef(name=name):
                yield prefix + name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name
            case ast.Assign(targets=targets):
                yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def missing_places(text: str) -> list[str]:
    """Of all `file.py:name` in a text, those that are not in the package."""
    missing = []
    for file, name in PLACE.findall(text):
        path = PACKAGE / file
        if not path.is_file() or name not in definitions(ast.parse(path.read_text(encoding="utf-8")).body):
            missing.append(f"{file}:{name}")
    return missing


def test_every_place_in_the_table_of_names_exists() -> None:
    text = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    assert len(PLACE.findall(text)) > 40
    assert missing_places(text) == []
    planted = "`batch.py:Batch.loss_masks`, `batches.py:Batch`, `batch.py:Batch.loss_mask`"
    assert missing_places(planted) == ["batch.py:Batch.loss_masks", "batches.py:Batch"]


NAMES_TO_FIND = (
    "loss_mask token_mask ar_mask input_mask make_attn_mask knowledge_insulation ki_fast_loss_weight embed_prefix "
    "embed_suffix compute_loss sample_actions kv_cache stop_gradient norm_stats"
)


@pytest.mark.parametrize("name", NAMES_TO_FIND.split())
def test_a_reader_of_pi0_finds(name: str) -> None:
    rows = (ROOT / "docs" / "names.md").read_text(encoding="utf-8").splitlines()
    assert any(f"`{name}`" in row.split("|")[1] and PLACE.search(row) for row in rows if row.startswith("|"))


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"]({page.name})" not in index] == ["README.md"]


def links(page: Path) -> list[str]:
    """Relative links of a page, without the part after #."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    return [target for target in targets if "://" not in target]


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    broken = [target for target in links(ROOT / page) if not (ROOT / page).parent.joinpath(target).exists()]
    assert broken == []


def test_the_readme_shows_the_example_that_runs() -> None:
    source = (ROOT / "examples" / "insulation.py").read_text(encoding="utf-8")
    after_docstring = source.split('"""', 2)[2].strip()
    assert f"```python\n{after_docstring}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_all_examples_are_run_by_make() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^test: .*\n(?:\t.*\n)*\t\$\(MAKE\) examples$", recipe, re.MULTILINE)
    assert "examples/*.py" in recipe
