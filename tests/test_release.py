"""What keeps a checkout from being released is said before anything is built."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from release import find_version, list_problems, release

ROOT = Path(__file__).parent.parent
FILES = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "src/reknow/__init__.py", "README.md", "LICENSE", "NOTICE")


def run_git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with what a release reads, ready to be released."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    changes = (tmp_path / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = f"## [Unreleased]\n\n## [{find_version(ROOT)}] - 2026-01-01"
    assert "## [Unreleased]" in changes
    (tmp_path / "CHANGELOG.md").write_text(changes.replace("## [Unreleased]", dated), encoding="utf-8")
    (tmp_path / ".gitignore").write_text("dist/\nbuild/\n*.egg-info/\n", encoding="utf-8")
    for name, value in {"NAME": "A", "EMAIL": "a@b.c"}.items():
        monkeypatch.setenv(f"GIT_AUTHOR_{name}", value)
        monkeypatch.setenv(f"GIT_COMMITTER_{name}", value)
    run_git(tmp_path, "init", "--quiet")
    run_git(tmp_path, "add", ".")
    run_git(tmp_path, "commit", "--quiet", "--message", "all")
    return tmp_path


def test_a_ready_checkout_has_no_problems(checkout):
    assert list_problems(checkout) == []


def test_each_thing_that_is_missing_is_named(checkout):
    (checkout / "CHANGELOG.md").write_text("## [Unreleased]\n", encoding="utf-8")
    init = checkout / "src/reknow/__init__.py"
    init.write_text(init.read_text(encoding="utf-8").replace(find_version(ROOT), "9.9"), encoding="utf-8")
    cited = checkout / "CITATION.cff"
    cited.write_text(cited.read_text(encoding="utf-8").replace(find_version(ROOT), "9.9"), encoding="utf-8")
    run_git(checkout, "tag", f"v{find_version(ROOT)}")
    said = list_problems(checkout)
    assert [next(word for word in WORDS if word in line) for line in said] == list(WORDS)


WORDS = ("__init__", "CITATION", "CHANGELOG", "tagged already", "clean tree")


@pytest.mark.slow
def test_a_release_is_built_checked_and_tagged(checkout):
    pytest.importorskip("twine")
    pytest.importorskip("setuptools", minversion="77")
    tag = release(checkout, "--no-isolation")  # with isolation it would ask an index for setuptools
    built = {path.suffix for path in (checkout / "dist").iterdir()}
    assert built == {".whl", ".gz"}
    tags = subprocess.run(["git", "tag"], cwd=checkout, capture_output=True, text=True).stdout.split()
    assert tags == [tag]
    assert list_problems(checkout) == [f"{tag} is tagged already: raise the version in pyproject.toml"]
