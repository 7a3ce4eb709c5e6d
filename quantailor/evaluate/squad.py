"""How well an answer's text agrees with those that people gave: exact match and F1 of SQuAD 1.1.

Texts are compared in lower case, without ASCII punctuation, without the words a, an, the, and with single spaces; F1
is over the words between spaces, so it says little of scripts that write none. The best of several answers counts.
Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1, and the description of its evaluation.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """
    >>> normalized("The  Panthers' defense, a wall!")
    'panthers defense wall'
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers after normalization, else 0."""
    return _best(lambda ours, theirs: float(ours == theirs), prediction, answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """2 p r / (p + r) of the words that prediction and answer have in common, each as often as both have it."""
    return _best(_f1_of, prediction, answers)


def _f1_of(prediction: str, answer: str) -> float:
    ours, theirs = prediction.split(), answer.split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:  # two texts of nothing but articles have no word in common either
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _best(measure: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    ours = normalized(prediction)
    return max(measure(ours, normalized(answer)) for answer in answers)
