"""Makes a release: checks that the version is the same everywhere, builds, has twine check, tags; uploads nothing.

python scripts/release.py             # make release
python scripts/release.py --check     # says what is missing, and makes nothing
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from shutil import rmtree

import yaml

ROOT = Path(__file__).parent.parent


def find_version(root: Path) -> str:
    """The version that pyproject.toml says."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1]  # pyright: ignore[reportOptionalSubscript]


def list_problems(root: Path) -> list[str]:
    """What keeps this checkout from being released, each in a sentence with its remedy; none where nothing does."""
    version, problems = find_version(root), []
    package = (root / "src/reknow/__init__.py").read_text(encoding="utf-8")
    if f'__version__ = "{version}"' not in package:
        problems.append(f"expected __version__ = {version!r} in src/reknow/__init__.py: change it")
    cited = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    if cited != version:
        problems.append(f"expected version {version} in CITATION.cff; got {cited}: change it")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        problems.append(f"expected a line `## [{version}] - YYYY-MM-DD` below Unreleased in CHANGELOG.md: write it")
    if f"v{version}" in _git(root, "tag").split():
        problems.append(f"v{version} is tagged already: raise the version in pyproject.toml")
    if _git(root, "status", "--porcelain"):
        problems.append("expected a clean tree; got changes: commit them")
    return problems


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def release(root: Path, *options: str) -> str:
    """Builds dist/ (`options` go to `python -m build`), checks it and tags; returns the tag."""
    tag = f"v{find_version(root)}"
    rmtree(root / "dist", ignore_errors=True)
    rmtree(root / "build", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", "dist", *options, "."], cwd=root, check=True)
    built = sorted(str(path) for path in (root / "dist").iterdir())
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built], cwd=root, check=True)
    _git(root, "tag", "--annotate", tag, "--message", f"reknow {tag}")
    return tag


if __name__ == "__main__":
    if found := list_problems(ROOT):
        sys.exit("\n".join(found))
    if "--check" not in sys.argv:
        print(f"tagged {release(ROOT)}; dist/ holds what can be uploaded")
