"""Tasks of lm-evaluation-harness, run on a model as it is now: with its patches, memories and chat template.

The harness's own loop asks, so that its tasks are read as it reads them everywhere; what it asks goes through `LM`.
Nothing is fetched for the bundled tasks, nothing is sent anywhere, and random states are as they were.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from reknow.errors import InputError, MissingExtra
from reknow.files.cache import cache_folder
from reknow.lm import LM
from reknow.model.tokens import EncodedText, make_batches
from reknow.progress import progress

__all__ = ["BUNDLED", "TaskScores", "check_tasks", "run_tasks"]

BUNDLED = ("lambada_like", "choice", "cloze")
"""Tasks that lie in the package: 120, 130 and 120 items."""
_ANSWER_TOKENS = 256
"""Of what a task lets the model write, where it does not say how much."""
_DESCRIBING = ("get_git_commit_hash", "add_env_info", "add_tokenizer_info")
"""Functions by which the harness describes in its own result where it ran."""
_FEWSHOT_SEED = 1234
"""The harness's own: which examples are shown before a question."""


class TaskScores(NamedTuple):
    """What a model did in a task."""

    task: str
    metric: str
    """The first one that the task names."""
    values: tuple[float, ...]
    """Of each item."""


def check_tasks(names: Sequence[str], *, own_code: bool = False) -> None:
    """Raises before anything is run.

    Args:
        own_code: whether code of a task's folder (`!function` in its YAML files) may be run.

    Raises:
        MissingExtra: lm-evaluation-harness is not installed.
        InputError: there is no such task; a name twice; or a folder that has code.
    """
    if len(set(names)) < len(names) or not all(names):
        raise InputError(f"expected names of tasks, each once; got {', '.join(map(repr, names))}: correct them")
    harness = _harness()
    others = [name for name in names if name not in BUNDLED]
    for name in list(others):
        if (path := Path(name).expanduser()).exists():
            others.remove(name)
            sources = [path] if path.is_file() else sorted(path.rglob("*.yaml"))
            if not sources:
                raise InputError(
                    f"expected YAML files of tasks in {name}; it has none: name the folder that has them"
                )
            coded = next((one for one in sources if "!function" in one.read_text(encoding="utf-8")), None)
            if coded is not None and not own_code:
                raise InputError(
                    f"expected tasks without code; {coded} runs some of its folder: give --trust-remote-code, if "
                    "you trust it"
                )
    if others:
        with _quiet():
            known = harness.tasks.TaskManager().all_tasks
        for name in others:
            if name not in known:
                near = difflib.get_close_matches(name, [*BUNDLED, *known], n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise InputError(
                    f"unknown task '{name}'.{hint} Known: {', '.join(BUNDLED)}, the {len(known):,} of "
                    "lm-evaluation-harness, and folders of tasks"
                )


def run_tasks(lm: LM, names: Sequence[str]) -> list[TaskScores]:
    """What the model as it is now does in each task; of a group or folder in all its tasks.

    Raises:
        MissingExtra: lm-evaluation-harness is not installed.
        InputError: a task cannot be read, or it has no number for each of its items.
    """
    harness = _harness()
    found: list[TaskScores] = []
    for name in progress.each("abilities", names, unit="tasks"):
        path = Path(name).expanduser()
        try:
            with _quiet():
                manager = harness.tasks.TaskManager(
                    include_path=str(path) if path.is_dir() else None,
                    include_defaults=name not in BUNDLED and not path.exists(),
                )
                tasks = [_bundled(name)] if name in BUNDLED else [name]
                tasks = manager.all_tasks if path.is_dir() else [str(path)] if path.is_file() else tasks
                results = harness.simple_evaluate(
                    _asked_by_harness(lm),
                    tasks=tasks,
                    task_manager=manager,
                    bootstrap_iters=0,
                    random_seed=None,
                    numpy_random_seed=None,
                    torch_random_seed=None,
                    fewshot_random_seed=_FEWSHOT_SEED,
                )
        except (KeyError, ValueError, TypeError, OSError) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise InputError(
                f"expected a task that lm-evaluation-harness can run; {name} is none ({reason}): correct it"
            ) from error
        found += _scores(results)
    return found


def _harness() -> Any:
    try:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        import datasets.config  # type: ignore[import-not-found]
        import lm_eval  # type: ignore[import-not-found]
        import lm_eval.tasks  # type: ignore[import-not-found]
    except ImportError:
        raise MissingExtra("lm-eval", "ability", "measuring abilities") from None
    datasets.config.HF_DATASETS_CACHE = str(cache_folder() / "harness")  # where what tasks fetch is kept
    return lm_eval


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, the harness says nothing, starts no programs to describe the machine (git, pip, compilers), and it
    leaves random states as they were."""
    import lm_eval.api.task as tasks  # type: ignore[import-not-found]
    import lm_eval.evaluator as evaluator  # type: ignore[import-not-found]

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def bare(items: Any = None, *_args: Any, **_options: Any) -> Any:
        return items

    replaced = [(tasks, "tqdm"), *((evaluator, name) for name in _DESCRIBING)]
    before = [getattr(module, name) for module, name in replaced]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for module, name in replaced:
            setattr(module, name, bare)
        yield
    finally:
        for (module, name), own in zip(replaced, before, strict=True):
            setattr(module, name, own)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _bundled(name: str) -> dict[str, Any]:
    """The task of a YAML file in the package, with its items in memory: reading them needs no cache."""
    import datasets  # type: ignore[import-not-found]

    with as_file(files("reknow") / "assets" / "ability") as folder:
        config = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    items = datasets.Dataset.from_list([json.loads(line) for line in lines])
    return {**config, "dataset_kwargs": None, "custom_dataset": lambda **_: {config["test_split"]: items}}


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScores]:
    """The items' numbers in the first metric of each task."""
    for task, samples in results["samples"].items():
        metric = results["configs"][task]["metric_list"][0]["metric"]
        first = samples[0].get("filter", "none") if samples else "none"
        values = [sample.get(metric) for sample in samples if sample.get("filter", "none") == first]
        numbers = [value for value in values if isinstance(value, (bool, int, float, np.number)) and 0 <= value <= 1]
        if not values or len(numbers) < len(values):
            raise InputError(
                f"expected a number from 0 to 1 for each item of {task}; its first metric {metric} gives others: put "
                "one such as acc first"
            )
        yield TaskScores(task, metric, tuple(map(float, numbers)))


def _asked_by_harness(lm: LM) -> Any:
    """The model in the form that the harness asks."""
    from lm_eval.api.model import LM as Asked  # type: ignore[import-not-found]
    from lm_eval.utils import (  # type: ignore[import-not-found]
        get_rolling_token_windows,
        make_disjoint_window,
    )

    class Ours(Asked):
        """Texts in, likelihoods and texts out."""

        def loglikelihood(self, requests):
            return loglikelihoods(lm, [tuple(request.args) for request in requests])  # type: ignore[misc]

        def loglikelihood_rolling(self, requests):
            longest = lm.max_tokens or 2048
            sums = []
            for (text,) in (request.args for request in requests):
                ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
                windows = map(make_disjoint_window, get_rolling_token_windows(ids, _first_token(lm), longest, 1))
                rows = [EncodedText((*context, *tokens), len(context)) for context, tokens in windows]
                sums.append(sum(log_prob for log_prob, _ in _read(lm, rows)))
            return sums

        def generate_until(self, requests):
            return [written(lm, *request.args) for request in requests]

    return Ours()


def loglikelihoods(lm: LM, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """log P of each continuation behind its context, and whether it is what the model says."""
    found: dict[int, tuple[float, bool]] = {}
    asked: dict[int, tuple[str, str, str]] = {}
    alone: dict[int, EncodedText] = {}
    for i, (context, continuation) in enumerate(pairs):
        bare = context.rstrip(" ")
        behind = context[len(bare) :] + continuation
        if bare:
            target = behind.lstrip(" ")
            asked[i] = bare, target, behind[: len(behind) - len(target)]
        else:  # a text by itself
            ids = lm.tokenizer(behind, add_special_tokens=False)["input_ids"]
            alone[i] = EncodedText((_first_token(lm), *ids), 1)
    if asked:
        scores = lm.score(*map(list, zip(*asked.values(), strict=True)))
        found |= {i: (-s.nll * len(s.correct), s.said) for i, s in zip(asked, scores, strict=True)}
    found |= dict(zip(alone, _read(lm, [*alone.values()]), strict=True))
    return [found[i] for i in range(len(pairs))]


@torch.no_grad()
def _read(lm: LM, rows: Sequence[EncodedText]) -> list[tuple[float, bool]]:
    """log P of the targets of rows behind their prompts, and whether they are said; routers are not asked."""
    found: dict[int, tuple[float, bool]] = {}
    begun = [EncodedText(row.ids[:-1], row.prompt_length) for row in rows]  # the last token predicts nothing
    with lm.exclusive():
        for part in make_batches([len(row.ids) for row in begun], lm.device):
            batch = lm.pad([begun[i] for i in part])
            logits = lm.forward(batch.ids, batch.mask, batch.positions, None).logits
            for i, row_logits in zip(part, logits, strict=True):
                log_probs = row_logits[-len(rows[i].target_ids) :].float().log_softmax(-1)
                wanted = torch.tensor(rows[i].target_ids, device=log_probs.device)
                log_prob = float(log_probs.gather(1, wanted[:, None]).sum())
                found[i] = log_prob, bool((log_probs.argmax(-1) == wanted).all())
    return [found[i] for i in range(len(rows))]


def _first_token(lm: LM) -> int:
    """What stands before a text: the token that begins texts, or the one that ends them. It is one, where the
    harness's own class sets it twice if the tokenizer sets one too."""
    first = lm.tokenizer.bos_token_id
    return lm.tokenizer.eos_token_id if first is None else first


def written(lm: LM, context: str, options: Mapping[str, Any]) -> str:
    """What the model writes until one of the texts `until` comes, greedily unless the task samples."""
    until = options.get("until") or []
    ends = [until] if isinstance(until, str) else list(until)
    room = int(options.get("max_gen_toks") or options.get("max_new_tokens") or _ANSWER_TOKENS)
    if lm.max_tokens is not None:
        room = max(1, min(room, lm.max_tokens + 1 - len(lm.tokenizer(context)["input_ids"])))
    heard = [""]

    def enough(_number: int, piece: str) -> bool:
        heard[0] += piece
        return any(end in heard[0] for end in ends)

    sampling: dict[str, Any] = {}
    if options.get("do_sample") and (temperature := float(options.get("temperature") or 0)) > 0:
        sampling = {"top_k": int(options.get("top_k") or 50), "temperature": temperature}
    text = lm.generate([context], room, listener=enough, **sampling)[0]
    return text[: min((text.index(end) for end in ends if end in text), default=len(text))]
