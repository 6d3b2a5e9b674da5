#!/usr/bin/env python3
"""How the code reads, in figures: `python scripts/figures.py [FOLDER]`, src/insula unless given. Exit code 1 where a
limit is missed.

comments per code line     comment tokens, whole lines and ends of lines alike, for each line that holds code. Blank
                           lines, comments and docstrings are no code. Any statement that is a string alone is a
                           docstring, so those below a field count as such.
blank lines in functions   of the lines from the first statement after a function's docstring to its last line, the
                           share that is empty. Lines inside a string are text, not blank. An inner function is part
                           of the outer one.
docstrings                 of the modules' public functions, classes and their methods, the share with one. A name with
                           a leading underscore is not public, nor is anything inside it or inside a function.
unpacked assignments       `self.a, self.b = ...`: each attribute deserves a line.
British spellings          names in the code, not text.
long functions, files      from `def` to the last line, docstring included; all lines of a file.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMENTS, BLANKS, DOCSTRINGS = 0.06, 0.06, 0.90  # at least
FUNCTION_LINES, FILE_LINES = 60, 400  # at most

Function = ast.FunctionDef | ast.AsyncFunctionDef
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
BRITISH = re.compile(
    r"(?:normal|token|optim|initial|serial|recogn|organ|quant|random|summar|visual|discret|general|minim|maxim)is(?:e|ing|ation)"
    r"|colour|behaviour|neighbour|favour|centre|metre(?!s?_per)|grey|labell|cancell|modell|travell|artefact|catalogue|analyse",
    re.IGNORECASE,
)


@dataclass
class Figures:
    """What was counted, in one file or in all."""

    code: int = 0
    comments: int = 0
    function_lines: int = 0
    blank: int = 0
    public: int = 0
    undocumented: list[str] = field(default_factory=list)
    unpacked: list[str] = field(default_factory=list)
    british: list[str] = field(default_factory=list)
    long_functions: list[str] = field(default_factory=list)
    long_files: list[str] = field(default_factory=list)

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def count(source: str, name: str) -> Figures:
    """The figures of one file's text. `name` stands before the line number of whatever is listed."""
    tree = ast.parse(source)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    lines = source.splitlines()
    docstrings = {line for node in ast.walk(tree) if is_docstring(node) for line in span(node)}
    code = {
        line
        for token in tokens
        if token.type not in LAYOUT and token.type != tokenize.COMMENT
        for line in range(token.start[0], token.end[0] + 1)
    } - docstrings

    inside = {line for node in ast.walk(tree) if isinstance(node, Function) for line in body_lines(node)}
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    named = {token.string: token.start[0] for token in tokens if token.type == tokenize.NAME}
    public = list(public_definitions(tree))

    return Figures(
        code=len(code),
        comments=sum(token.type == tokenize.COMMENT for token in tokens),
        function_lines=len(inside - docstrings),
        blank=sum(not lines[line - 1].strip() for line in inside - docstrings - code),
        public=len(public),
        undocumented=[f"{name}:{node.lineno} {node.name}" for node in public if not ast.get_docstring(node)],
        unpacked=[f"{name}:{line}" for line in unpacked_assignments(tree)],
        british=[f"{name}:{line} {word}" for word, line in named.items() if BRITISH.search(word)],
        long_functions=[
            f"{name}:{f.lineno} {f.name}: {len(span(f))}" for f in functions if len(span(f)) > FUNCTION_LINES
        ],
        long_files=[f"{name}: {len(lines)}"] if len(lines) > FILE_LINES else [],
    )


def span(node: ast.stmt | ast.AST) -> range:
    """The lines of a statement."""
    assert isinstance(node, ast.stmt) and node.end_lineno is not None
    return range(node.lineno, node.end_lineno + 1)


def is_docstring(node: ast.AST) -> bool:
    """A statement that is a string alone."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def body_lines(function: Function) -> range:
    """From the first statement after the docstring to the last line."""
    body = function.body[1:] if is_docstring(function.body[0]) else function.body
    return range(body[0].lineno, span(function).stop) if body else range(0)


def public_definitions(node: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Public functions, classes and methods of a module or class."""
    for child in node.body:
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child)


def unpacked_assignments(tree: ast.Module) -> Iterator[int]:
    """Lines that assign several attributes of `self` at once."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                parts = target.elts if isinstance(target, ast.Tuple) else []
                if (
                    sum(
                        isinstance(p, ast.Attribute) and isinstance(p.value, ast.Name) and p.value.id == "self"
                        for p in parts
                    )
                    > 1
                ):
                    yield node.lineno


def report(total: Figures) -> tuple[list[str], bool]:
    """The lines to print, and whether every limit is kept."""
    documented = total.public - len(total.undocumented)
    shares = {
        "comments per code line": (total.comments, total.code, COMMENTS),
        "blank lines in functions": (total.blank, total.function_lines, BLANKS),
        "docstrings": (documented, total.public, DOCSTRINGS),
    }
    lists = {
        "unpacked assignments": total.unpacked,
        "British spellings": total.british,
        f"functions over {FUNCTION_LINES} lines": total.long_functions,
        f"files over {FILE_LINES} lines": total.long_files,
    }
    lines = []
    kept = True
    for label, (part, whole, least) in shares.items():
        share = part / max(whole, 1)
        kept &= share >= least
        lines.append(
            f"{label:<28} {share:.3f}   {part} of {whole}, at least {least}{'' if share >= least else '   MISSED'}"
        )
    for label, found in lists.items():
        kept &= not found
        lines.append(f"{label:<28} {len(found)}   at most 0{'   MISSED' if found else ''}")
        lines += [f"    {entry}" for entry in found]
    if documented / max(total.public, 1) < DOCSTRINGS:
        lines += ["without a docstring:", *(f"    {entry}" for entry in total.undocumented)]
    return lines, kept


def by_room(files: dict[Path, Figures], folder: Path) -> list[str]:
    """Comments per code line and blank lines in functions of each room: a folder, or a file beside the folders."""
    rooms: dict[str, Figures] = {}
    for path, figures in files.items():
        room = path.relative_to(folder).parts[0]
        rooms[room] = rooms.get(room, Figures()) + figures
    return [
        f"    {room:<24} {f.comments / max(f.code, 1):.3f} {f.blank / max(f.function_lines, 1):.3f}   {f.code} lines"
        for room, f in rooms.items()
    ]


def main(folder: Path) -> int:
    """Print the figures of all Python files below `folder`; 0 where every limit is kept, else 1."""
    if not folder.is_dir():
        sys.exit(f"{folder}: no such folder")
    files = {path: count(path.read_text(encoding="utf-8"), str(path)) for path in sorted(folder.rglob("*.py"))}
    lines, kept = report(sum(files.values(), Figures()))
    print("\n".join(["comments and blank lines, by room", *by_room(files, folder), "", *lines]))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "src" / "insula"))
