"""How good a model is: scorers, evaluation on any data, fixed test sets, reports of the scores."""

from nanomolmo2.evaluation.measures import SCORERS as SCORERS
from nanomolmo2.evaluation.run import evaluate as evaluate
from nanomolmo2.evaluation.summary import Report as Report

__all__ = ["SCORERS", "Report", "evaluate"]
