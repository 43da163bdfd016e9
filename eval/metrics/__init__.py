"""Scoring rules as pure functions of (prediction, target), or of rows: plain mappings whose keys they document."""

from eval.metrics.captions import cider
from eval.metrics.exact_match import exact_match
from eval.metrics.gqa import gqa_accuracy
from eval.metrics.multiple_choice import circular_accuracy
from eval.metrics.text import anls, nlvr_scores, relaxed_accuracy
from eval.metrics.vqa import vqa_soft_accuracy
from eval.metrics.yes_no import mme_scores, pope_scores

__all__ = [
    "anls",
    "cider",
    "circular_accuracy",
    "exact_match",
    "gqa_accuracy",
    "mme_scores",
    "nlvr_scores",
    "pope_scores",
    "relaxed_accuracy",
    "vqa_soft_accuracy",
]
