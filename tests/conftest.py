"""Fixtures: tiny models, and one thread so that timings and sums do not depend on the machine's load."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded, here and by programs of the tests
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("REKNOW_PROGRESS", "0")  # what commands print does not depend on how fast they are
torch.set_num_threads(1)

from browser import chromium  # noqa: E402, F401, a fixture
from families import tiny_model, tiny_tokenizer  # noqa: E402
from llm_server import serve  # noqa: E402, F401, a fixture
from reknow import LM, Edit, Patch  # noqa: E402
from reknow.editing.keys import Site  # noqa: E402
from reknow.editing.search import SearchRules, ValueSearchMethod  # noqa: E402
from reknow.evaluation import probing  # noqa: E402
from reknow.files.cache import MODELS, cache_folder  # noqa: E402
from reknow.model.packaged import PACKAGED  # noqa: E402
from reknow.model.tokens import Text  # noqa: E402
from reknow.patching.deltas import Dense, LowRank  # noqa: E402
from web_page import open_tab, page_folder, page_process  # noqa: E402, F401, fixtures


@pytest.fixture(autouse=True, scope="session")
def private_cache(request, tmp_path_factory):
    """Statistics made by tests stay with the tests; converted models stay from one run of them to the next."""
    os.environ["REKNOW_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    if cache := getattr(request.config, "cache", None):
        (cache_folder() / MODELS).symlink_to(cache.mkdir(MODELS))


def opened(name: str, **options) -> LM:
    """A model that others trained; the test is skipped where it is not installed."""
    for package in PACKAGED[name].parts:
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed (make {'gemma' if name == 'gemma3' else 'setup'})")
    return LM.demo(name, **options)


@pytest.fixture(scope="session")
def smollm2() -> LM:
    return opened("smollm2")


@pytest.fixture(scope="session")
def gemma3() -> LM:
    return opened("gemma3")


@pytest.fixture
def edit() -> Edit:
    return Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English", target_true="French")


@pytest.fixture(scope="module")
def short_texts():
    """Sampled texts have 30 tokens with their prompts, and not a hundred."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(probing, "SAMPLED_TOKENS", 30)
        yield


DEVICE = os.environ.get("REKNOW_TEST_DEVICE")
"""Where tiny models are put: cuda, or `twin`, which stands in for it on a CPU; None: on the CPU."""
if DEVICE == "twin":
    importlib.import_module("twin")


def make_lm(family: str = "gpt2", *, dtype: torch.dtype | None = None, **changes) -> LM:
    """A tiny random LM of a family, on the device that REKNOW_TEST_DEVICE names."""
    pair = tiny_model(family, **changes), tiny_tokenizer(bos=family == "llama")
    return LM(pair, dtype=dtype, device=DEVICE)


def random_states() -> list[torch.Tensor]:
    """What torch draws from, on the CPU and where the tests run."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if (DEVICE or "").startswith("cuda") else [])]


VALUES = ("mlp.c_proj", "mlp.fc_out", "mlp.dense_4h_to_h", "mlp.down_proj")
"""Ends of the names of value matrices."""


def without_weights(kind: str, **sizes) -> LM:
    """An LM of these sizes that cannot be run: its weights take no memory."""
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    lm = object.__new__(LM)
    value = next(name for name, _ in model.named_modules() if name.endswith(VALUES))
    parts = SimpleNamespace(blocks=range(config.num_hidden_layers), value=[value], hidden_size=config.hidden_size)
    lm.name, lm.model, lm.parts = "no weights", model, parts
    return lm


def saved(folder, family: str = "gpt2", **changes) -> str:
    """The folder, with a tiny random model in it."""
    return save(make_lm(family, **changes), folder)


def save(lm: LM, folder) -> str:
    """The folder, with the model as it is now."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def family(request) -> str:
    """The second one's Conv1D stores (in, out); it is also what `make_lm` gives where no family is named."""
    return request.param


@pytest.fixture
def lm(family) -> LM:
    return make_lm(family)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Commands run in an empty folder, so that a test sees everything they write."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def some_patch(
    lm: LM, seed: int = 0, *, rank: int = 1, dense: bool = False, size: float = 0.1, layers=(1,), **fields
):
    """A patch with random changes of the value matrices."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in layers:
        out, inside = lm.base_weight(lm.parts.value[layer]).shape
        left, right = (torch.randn(*s, generator=generator) * size**0.5 for s in ((out, rank), (rank, inside)))
        deltas[lm.parts.value[layer]] = Dense(left @ right) if dense else LowRank(left, right)
    edits = (Edit("The capital of {} is", subject=f"Land {seed}", target_new="Lima", context=("a", "b")),)
    settings = dict(layer=1, groups=((1, 2),), rate=1e-3, bound=None)
    return Patch("rome", settings, edits, deltas, lm.fingerprint, notes={"losses": [1.5, 0.1]}, **fields)


@dataclass(frozen=True, kw_only=True)
class AuthorsSearch(ValueSearchMethod):
    """The search as ROME's authors run it, where what methods fix can be set too."""

    name = "search"
    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0
    units: str = "absolute"
    stop_probability: float = 1.0
    min_delta: float = 0.0
    context_batches: int = 1
    site: Site = "value"
    stop_loss: float = 0.05
    stop_drift: float | None = None
    merge_subjects: bool = False

    @property
    def rules(self) -> SearchRules:
        names = ("site", "stop_loss", "stop_drift", "merge_subjects")
        return SearchRules(**{name: getattr(self, name) for name in names})

    def edit(self, lm, edits):
        raise NotImplementedError("it only searches")


OUR_NAMES = {
    "v_num_grad_steps": "steps",
    "v_lr": "learning_rate",
    "kl_factor": "kl_weight",
    "v_weight_decay": "weight_decay",
    "clamp_norm_factor": "clamp",
    "mom2_update_weight": "covariance_weight",
    "emmet_lambda": "ridge",
    "nullspace_threshold": "null_threshold",
    "L2": "l2",
}
"""A setting in the files of kmeng01/rome and of those who follow them → our field."""


def our_names(hparams: dict) -> dict:
    """Settings of the authors' run by the names of our fields; layers are left out."""
    return {OUR_NAMES[name]: value for name, value in hparams.items() if name in OUR_NAMES}


def bits(lm: LM) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().view(torch.uint8) for name, p in lm.model.named_parameters() if p.dim()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Equal but for rounding in float32, which is relative to the largest numbers of a sum and differs by machine."""
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def alone(lm: LM, prompt: str, tokens: int) -> list[int]:
    """The most likely tokens behind a prompt that is read by itself, a full pass for each, up to the end token."""
    (row,) = lm.encode([Text(prompt)])
    ids = list(row.ids)
    while len(ids) < len(row.ids) + tokens and ids[-1] != lm.tokenizer.eos_token_id:
        text, end = torch.tensor([ids], device=lm.device), torch.tensor([len(row.ids)], device=lm.device)
        places = torch.arange(len(ids), device=lm.device)[None]
        logits = lm.forward(text, torch.ones_like(text), places, None, ends=end).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(row.ids) :]


def pytest_collection_finish():
    """What is imported by now stays, so that no collection of garbage goes over it; `score` makes several."""
    gc.collect()
    gc.freeze()


MARKERS = ("contract", "golden", "real", "slow")


def pytest_terminal_summary(terminalreporter):
    """How long the tests of each marker took, and all of them: seconds of the processes that ran them."""
    reports = [one for found in terminalreporter.stats.values() for one in found if hasattr(one, "duration")]
    seconds = {name: sum(one.duration for one in reports if name in one.keywords) for name in MARKERS}
    shares = ", ".join(f"{name} {total:.0f} s" for name, total in seconds.items() if total)
    total = sum(one.duration for one in reports)
    terminalreporter.write_line(f"time in tests: {total:.0f} s{f' ({shares})' if shares else ''}")
