"""Writes the bundled editors anew with the settings under the names that their methods' fields have now.

    python scripts/rename_editor_settings.py

Tensors stay bit for bit; an editor whose names are the present ones is left alone.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from reknow.checks.bounds import current_names
from reknow.learning.editors import Editor
from reknow.registry import METHODS

EDITORS = Path(__file__).parent.parent / "src" / "reknow" / "assets" / "editors"


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    for path in sorted(EDITORS.glob("*.safetensors")):
        editor = Editor.load(path)
        settings = current_names(METHODS[editor.method].method, editor.settings)
        if settings != editor.settings:
            replace(editor, settings=settings).save(path)
            print(f"{path.name}: {', '.join(sorted(settings.keys() - editor.settings.keys()))}")


if __name__ == "__main__":
    main()
