"""By what a file is known again."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path


def file_digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of its files and their names."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            if file != path:
                digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def digest_now(file: Path) -> str:
    """`file_digest` of a file, read again only where its size or the time of its last change is another."""
    status = file.stat()
    return _digest_of(file, status.st_size, status.st_mtime_ns)


@lru_cache
def _digest_of(file: Path, size: int, changed: int) -> str:
    return file_digest(file)
