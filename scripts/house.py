"""The shape of the code in numbers: sizes, the order of the rooms, what one edit loads.

    python scripts/house.py            counts src/reknow
    python scripts/house.py OTHER/src  and another checkout beside it

`tests/test_rooms.py` holds the limits.
"""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent.parent / "src"

ORDER = (
    "errors",
    "display",
    "progress",
    "texts",
    "edits",
    "checks",
    "registry",
    "files",
    "datasets",
    "model",
    "published",
    "patching",
    "lm",
    "engine",
    "contract",
    "tracing",
    "editing",
    "learning",
    "memories",
    "methods",
    "evaluation",
    "report",
    "instructions",
    "export",
    "serving",
    "studies",
    "ui",
    "cli",
    "__main__",
)
"""Rooms and files of the root, the lowest first. `__init__` only names what is public."""

LOADED = """
import sys
from reknow import LM, Edit, ROME
from reknow.patching.patches import Patch
lm = LM.demo("gpt2")
{work}
loaded = [m for name, m in sys.modules.items() if name.split(".")[0] == "reknow" and getattr(m, "__file__", None)]
files = sorted({{m.__file__ for m in loaded}})
print(len(files), sum(len(open(file, encoding="utf-8").readlines()) for file in files))
"""
EDIT = 'Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")'


def modules(source: Path = HERE) -> dict[str, Path]:
    """Dotted name below `reknow` → file; a package's own file has the package's name, that of the root none."""
    named = {}
    for path in (source / "reknow").rglob("*.py"):
        parts = path.relative_to(source / "reknow").with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, wherever the import stands: for types and inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            wanted = [full if full.removeprefix("reknow.") in known else node.module for full in named]
        elif isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        else:
            continue
        found |= {full.removeprefix("reknow.") for full in wanted if full.startswith("reknow.")}
    return found


def room(name: str) -> str:
    """The room of a module, or its own name where it stands at the root."""
    return name.split(".")[0]


def code_lines(path: Path) -> int:
    """Lines of a file that are neither blank nor comment nor docstring."""
    text = path.read_text(encoding="utf-8")
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        for part in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if (
                isinstance(part, ast.Expr)
                and isinstance(part.value, ast.Constant)
                and isinstance(part.value.value, str)
            ):
                docs |= set(range(part.lineno, part.end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def public_names(path: Path) -> list[str]:
    """Names without an underscore that a file defines at its top."""
    names: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """(lines, name) of every function in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, node.name


def loaded(source: Path, work: str) -> str:
    """Files and lines of ours that a fresh process has loaded when it has done the work."""
    settings = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    script = LOADED.format(work=work)
    if not (source / "reknow" / "patching").exists():
        script = script.replace("reknow.patching.patches", "reknow.patches")
    run = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=True)
    files, lines = run.stdout.split()[-2:]
    return f"{files} files, {int(lines):,} lines"


def measured(source: Path) -> dict[str, str]:
    """What is counted → its value."""
    known = modules(source)
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in known.items()}
    counts = {name: code_lines(path) for name, path in known.items()}
    lengths = sorted(length for path in known.values() for length, _ in functions(path))
    methods = {name: size for name, size in sizes.items() if name.startswith("methods.")}
    base = "contract" if "contract" in known else "methods.base"
    methods.pop(base, None)
    places = {place: i for i, place in enumerate(ORDER)}
    up = [
        (name, other)
        for name, path in known.items()
        for other in imports(path, known)
        if name and places.get(room(other), -1) > places.get(room(name), -1)
    ]
    return {
        "files": str(len(known)),
        "lines": f"{sum(sizes.values()):,}",
        "code lines without studies/": f"{sum(n for name, n in counts.items() if room(name) != 'studies'):,}",
        "code lines of studies/": f"{sum(n for name, n in counts.items() if room(name) == 'studies'):,}",
        "files at the root": str(
            sum("." not in name and path.name != "__init__.py" for name, path in known.items()) + 1
        ),
        "largest file": str(max(sizes.values())),
        "largest method": f"{max(methods.values())}, {sum(size > 190 for size in methods.values())} over 190",
        "file of Method": str(sizes[base]),
        "function, p90 and longest": f"{lengths[int(0.9 * len(lengths))]}, {lengths[-1]}",
        "public names": str(sum(len(public_names(path)) for path in known.values())),
        "imports that run up": str(len(up)) if "patching" in known else "no rooms",
        "loaded by one ROME edit": loaded(source, f"patch = ROME(layer=1, covariance_tokens=0).edit(lm, [{EDIT}])"),
    }


def main() -> None:
    sources = [HERE, *(Path(argument) for argument in sys.argv[1:])]
    tables = [measured(source) for source in sources]
    for name in tables[0]:
        print(f"{name:32}", *(f"{table[name]:28}" for table in tables))


if __name__ == "__main__":
    main()
