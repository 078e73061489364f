"""Measures which layer of each bundled model to edit and writes src/reknow/assets/layers.json, which is shipped.

python scripts/measure_layers.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "src" / "reknow" / "assets"


def main() -> None:
    from reknow import LM
    from reknow.editing.layer_choice import FILE, best_score
    from reknow.editing.layer_trials import measure_layers

    (ASSETS / FILE).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REKNOW_CACHE"] = folder
        for name in sorted(entry.name for entry in (ASSETS / "models").iterdir() if entry.is_dir()):
            print(name, "layer", best_score(measure_layers(LM.demo(name))).layer)
        text = (Path(folder) / FILE).read_text(encoding="utf-8")
    (ASSETS / FILE).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
