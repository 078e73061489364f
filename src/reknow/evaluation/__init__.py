"""Did the edit work, and what else did it change: readings, metrics, runs."""

from reknow.evaluation.plan import Plan
from reknow.evaluation.results import Results
from reknow.evaluation.runner import bench, evaluate, score

__all__ = ["Plan", "Results", "bench", "evaluate", "score"]
