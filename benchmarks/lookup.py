"""How long a memory takes to find the edit that a question may be about.

    python benchmarks/lookup.py [--edits 100000] [--features 64] [--threads 1]

Vectors lie in clusters, as those of edits of one relation do; a question lies close to one of them. Times are CPU
time of a single question, minimum, median and 95th percentile over 200. Besides, SERAC's classifiers on the demo
model: the pass that makes the question's vector, and the cross classifier, which reads 8 edits with the question.
"""

import argparse
import statistics
import time

import torch

from reknow import LM, SERAC, load_cases
from reknow.memories.nearest import Nearest
from reknow.memories.serac.models import ScopeAndCounterfactual

QUESTIONS, RELATIONS, SPREAD, DISTANCE = 200, 34, 0.7, 0.1


def vectors(edits: int, features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stored, questions, the stored one that each question is about)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(RELATIONS, features, generator=generator)
    relation = torch.randint(RELATIONS, (edits,), generator=generator)
    stored = centres[relation] + SPREAD * torch.randn(edits, features, generator=generator)
    asked = torch.randint(edits, (QUESTIONS,), generator=generator)
    return stored, stored[asked] + DISTANCE * torch.randn(QUESTIONS, features, generator=generator), asked


def measured(index: Nearest, questions: torch.Tensor, asked: torch.Tensor) -> tuple[float, float, float, float]:
    """CPU milliseconds of a look-up of 8: least, median, 95th percentile; the share that found the right first."""
    times, right = [], 0
    index.search(questions[:1], 8)
    for question, place in zip(questions, asked, strict=True):
        started = time.process_time()
        _, places = index.search(question[None], 8)
        times.append(1000 * (time.process_time() - started))
        right += int(places[0, 0] == place)
    return min(times), statistics.median(times), statistics.quantiles(times, n=20)[-1], right / len(asked)


def classifiers():
    """(name, CPU milliseconds of each question) of what comes before and behind the look-up, not trained."""
    modules = ScopeAndCounterfactual(SERAC(classifier="cross"), LM.demo("gpt2"))
    texts = [case.edit.text for case in load_cases("counterfact", limit=48)]
    reads = {
        "vector of the question": lambda i: modules.embed([texts[i]]),
        "cross classifier, 8 edits": lambda i: modules.log_p(texts[i + 1 : i + 9], [texts[i]] * 8),
    }
    for name, read in reads.items():
        times = []
        for i in range(40):
            started = time.process_time()
            read(i)
            times.append(1000 * (time.process_time() - started))
        yield name, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--edits", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stored, questions, asked = vectors(args.edits, args.features)
    print(f"{args.edits:,} stored vectors of {args.features} numbers, {args.threads} threads")
    print(
        "| look-up | built in, s | least, ms | median, ms | 95 %, ms | right one first |\n|---|---|---|---|---|---|"
    )
    for name, approximate in (("exact", False), ("approximate (faiss)", True)):
        started = time.process_time()
        index = Nearest(stored, approximate=approximate)
        built = time.process_time() - started
        least, median, slow, right = measured(index, questions, asked)
        print(f"| {name} | {built:.1f} | {least:.2f} | {median:.2f} | {slow:.2f} | {right:.1%} |", flush=True)
    for name, times in classifiers():
        median, slow = statistics.median(times), statistics.quantiles(times, n=20)[-1]
        print(f"| {name} | | {min(times):.2f} | {median:.2f} | {slow:.2f} | |")


if __name__ == "__main__":
    main()
