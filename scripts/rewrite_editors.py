"""Writes the bundled editors, or other editor files, anew under the names that settings have today.

    python scripts/rewrite_editors.py [FILE …]

Tensors stay as they are; the header gets today's names, and the file the digest that seals it.
"""

import sys
import warnings
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from reknow.checks.bounds import current_names
from reknow.learning.editors import Editor
from reknow.registry import METHODS

MEASURES = {"made": "success", "kept": "locality"}
"""What the measures of a training were called."""


def renamed(notes):
    """Notes of a training with today's names of what was measured."""
    if isinstance(notes, list):
        return [renamed(note) for note in notes]
    if not isinstance(notes, dict):
        return notes
    start = "validation "
    names = MEASURES | {start + old: start + new for old, new in MEASURES.items()}
    return {names.get(name, name): renamed(value) for name, value in notes.items()}


def main():
    bundled = Path(str(files("reknow"))) / "assets/editors"
    for path in map(Path, sys.argv[1:] or sorted(bundled.glob("*.safetensors"))):
        editor = Editor.load(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            settings = current_names(METHODS[editor.method].method, editor.settings)
        replace(editor, settings=settings, notes=renamed(editor.notes)).save(path)
        print(path)


if __name__ == "__main__":
    main()
