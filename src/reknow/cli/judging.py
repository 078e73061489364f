"""`reknow judge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reknow.cli.terminal import say, say_table
from reknow.errors import InputError
from reknow.progress import progress

_MILLION = 1_000_000


def judge(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.", show_default=False)],
    name: Annotated[str, typer.Option("--judge", help="A model at a chat server.", show_default=False)],
    server: Annotated[
        str | None, typer.Option("--judge-url", help="Its address up to /v1; else OPENAI_BASE_URL, or OpenAI.")
    ] = None,
    price: Annotated[
        str | None, typer.Option("--price", help="IN,OUT of a million tokens of questions and of answers.")
    ] = None,
    at_once: Annotated[int, typer.Option("--at-once", min=1, max=64, help="Questions under way at a time.")] = 4,
) -> None:
    """Let a language model judge what the models of a run wrote; its verdicts are a protocol of the report.

    The same command goes on where it was stopped, or where the judge was down. The key is OPENAI_API_KEY. Questions,
    answers and what was written go to that server.
    """
    from reknow.evaluation import Results
    from reknow.evaluation.judged import agreements, ask_judge
    from reknow.files.llm import LLM
    from reknow.files.locks import write_lock
    from reknow.files.outputs import MANIFEST_FILE

    prices = _prices(price)
    llm = LLM(name, server)
    whole = (run / MANIFEST_FILE).exists()
    parts = [run] if whole else [path.parent for path in sorted(run.glob(f"*/{MANIFEST_FILE}"))]
    for part in progress.each("judging", parts or [run]):
        results = Results.load(part)
        with write_lock(part):
            verdicts = ask_judge([*results.before.values(), *results.rows.values()], llm, part, at_once=at_once)
        done, right = len(verdicts.given), sum(verdicts.given.values())
        say(*([f"== {part.name}"] if len(parts) > 1 else []))
        say(f"{done} of {verdicts.asked} texts judged by {name}, {verdicts.new} of them now; {right} right")
        if verdicts.undecided:
            say(f"{verdicts.undecided} without a verdict: it answered neither A nor B; the same command asks again")
        say(_cost(verdicts.tokens, prices), "")
        lines = [
            [one.match, f"{one.share:.1%}", "–" if one.kappa is None else f"{one.kappa:.2f}", str(one.count)]
            for one in agreements(verdicts.given)
        ]
        say_table(["match", "agrees with the judge", "Cohen's kappa", "texts"], lines)
    say("", f"the protocol `judged` is in: reknow report {run}")


def _prices(price: str | None) -> tuple[float, float] | None:
    """Of a token of questions and of answers; raises InputError where the option is something else."""
    if price is None:
        return None
    try:
        each, other = (float(part) / _MILLION for part in price.split(","))
    except ValueError:
        each = other = -1.0
    if not (0 <= each < float("inf") and 0 <= other < float("inf")):
        raise InputError(f"expected --price IN,OUT, two numbers from 0 on; got {price!r}: write it so")
    return each, other


def _cost(tokens: tuple[int, int] | None, prices: tuple[float, float] | None) -> str:
    """The tokens of all that was asked so far, and what they cost."""
    if tokens is None:
        return "tokens: the server does not count them"
    said = f"tokens so far: {tokens[0]:,} of questions, {tokens[1]:,} of answers"
    return said if prices is None else f"{said}; {tokens[0] * prices[0] + tokens[1] * prices[1]:.4f} at that price"
