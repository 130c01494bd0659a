"""Answers from generated text, their scores, and means with bootstrap intervals."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

Interval = dict[str, float | int | None]
"""``value``, ``low`` and ``high`` (95 % interval, None without one), and ``n``."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_FINAL_ANSWER = re.compile(r"so the answer is (.*?)\.", re.IGNORECASE)


def bbh_answer(text: str) -> str:
    """The answer in a chain of thought: after "So the answer is", up to the next period.

    The first paragraph where the phrase is missing, as LESS (arXiv:2402.04333) extracts it.
    """
    found = _FINAL_ANSWER.search(text)
    return found[1].strip() if found else text.strip().split("\n\n")[0].strip()


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether a prediction is one of the answers but for case, punctuation and outer spaces."""
    return any(_plain(prediction, answer) == _plain(answer, answer) for answer in answers)


def squad_exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """SQuAD's exact match (Rajpurkar et al., arXiv:1606.05250): articles do not count either."""
    return any(squad_normalise(prediction) == squad_normalise(answer) for answer in answers)


def squad_f1(prediction: str, answers: Sequence[str]) -> float:
    """SQuAD's F1 over the words in common, of the answer it fits best."""
    return max(_word_f1(prediction, answer) for answer in answers)


def squad_normalise(text: str) -> str:
    """Lower case, no punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _plain(text: str, answer: str) -> str:
    """Text without case and punctuation, unless the answer is punctuation only (brackets)."""
    plain = text.lower().translate(_PUNCTUATION).strip()
    return plain if answer.translate(_PUNCTUATION).strip() else text.strip()


def _word_f1(prediction: str, answer: str) -> float:
    predicted, wanted = squad_normalise(prediction).split(), squad_normalise(answer).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted))


def micro(values: Sequence[float], resamples: int, seed: int) -> Interval:
    """Mean over items with the percentile bootstrap interval (Efron 1979).

    Args:
        values: One value per item.
        resamples: Bootstrap draws; 0 for no interval.
        seed: Seed of the draws: the same items are drawn for every model.

    Raises:
        ValueError: There are no items.
    """
    data = np.asarray(values, dtype=np.float64)
    n = len(data)
    if n == 0:
        raise ValueError("a mean needs at least one item")
    low: float | None = None
    high: float | None = None
    if resamples:
        draw = np.random.default_rng(seed)
        means = [data[draw.integers(0, n, n)].mean() for _ in range(resamples)]
        low, high = (float(end) for end in np.quantile(means, [0.025, 0.975]))
    return {"value": float(data.mean()), "low": low, "high": high, "n": n}


def macro(values: Sequence[float], groups: Sequence[str], resamples: int, seed: int) -> Interval:
    """Mean over groups of the mean over their items; the interval draws groups.

    Args:
        values: One value per item.
        groups: The group (subject, language) of each item.
        resamples: Bootstrap draws; 0 for no interval.
        seed: Seed of the draws.

    Raises:
        ValueError: There are no items.
    """
    means = pd.Series(values, dtype=np.float64).groupby(list(groups), sort=True).mean()
    return micro(means.tolist(), resamples, seed)
