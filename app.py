"""The web page as a Hugging Face Space, on the bundled models: what a Space needs besides is in docs/ui.md."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "src"
if SOURCE.is_dir():  # a Space has the repository, and installs nothing of it
    sys.path.insert(0, str(SOURCE))

from reknow.ui.loading import without_stubs  # noqa: E402

with without_stubs():
    import gradio  # noqa: F401

from reknow.lm import LM  # noqa: E402
from reknow.ui.access import STRANGERS  # noqa: E402
from reknow.ui.desks import Desks  # noqa: E402
from reknow.ui.models import Models  # noqa: E402
from reknow.ui.page import build_page, look  # noqa: E402
from reknow.ui.server import open_ahead  # noqa: E402
from reknow.ui.work import collect_warnings  # noqa: E402

MODELS = ["demo:gpt2", "demo:llama"]

folder = tempfile.TemporaryDirectory(prefix="reknow-")
models = Models(LM)
demo = build_page(Desks(Path(folder.name), MODELS[0], private=True), models, MODELS, STRANGERS)

if __name__ == "__main__":
    collect_warnings()
    open_ahead(models, MODELS[0])
    demo.launch(max_file_size=STRANGERS.upload, show_error=False, ssr_mode=False, **look())
