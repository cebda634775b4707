"""Bag of words: TF-IDF of one- and two-word terms and a linear model, for each kind of judgement."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack, vstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeCV

Row = dict[str, Any]
STRENGTHS = (0.1, 1.0, 10.0)
"""Of the regularisation, chosen by cross-validation on the training rows."""


def vectorizer() -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)


class PairBaseline:
    """Logistic regression on the difference of two responses' terms; a response's score is its linear value."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._terms = vectorizer().fit([text for pair in pairs for text in pair])
        chosen, rejected = (self._terms.transform([pair[i] for pair in pairs]) for i in (0, 1))
        features = vstack([chosen - rejected, rejected - chosen])
        labels = np.repeat([1, 0], len(pairs))
        # The last three are scikit-learn's present defaults, named because it announces others.
        defaults = {"l1_ratios": (0,), "scoring": "accuracy", "use_legacy_attributes": False}
        model = LogisticRegressionCV(Cs=STRENGTHS, cv=3, fit_intercept=False, max_iter=1000, **defaults)
        self._model = model.fit(features, labels)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        return self._terms.transform(texts) @ self._model.coef_[0]


class ScoreBaseline:
    """Ridge regression of a score on a response's terms."""

    def __init__(self, texts: Sequence[str], scores: Sequence[float]) -> None:
        self._terms = vectorizer().fit(texts)
        self._model = RidgeCV(alphas=STRENGTHS).fit(self._terms.transform(texts), np.asarray(scores))

    def score(self, texts: Sequence[str]) -> np.ndarray:
        return self._model.predict(self._terms.transform(texts))


class StepBaseline:
    """Logistic regression on the terms of a step, its place and length, and how many of its numbers are new."""

    def __init__(self, rows: Sequence[Row]) -> None:
        steps = [(row, i) for row in rows for i in range(len(row["steps"])) if step_label(row, i) is not None]
        self._terms = vectorizer().fit([row["steps"][i] for row, i in steps])
        labels = [step_label(row, i) for row, i in steps]
        self._model = LogisticRegression(max_iter=1000).fit(self._features(steps), labels)

    def right_probabilities(self, row: Row) -> np.ndarray:
        """P(right) of each step."""
        return self._model.predict_proba(self._features([(row, i) for i in range(len(row["steps"]))]))[:, 1]

    def _features(self, steps: Sequence[tuple[Row, int]]) -> csr_matrix:
        plain = [[i, len(row["steps"]), len(row["steps"][i].split()) / 50, new_numbers(row, i)] for row, i in steps]
        return hstack(
            [self._terms.transform([row["steps"][i] for row, i in steps]), csr_matrix(np.array(plain))]
        ).tocsr()


def step_label(row: Row, i: int) -> int | None:
    """1 right, 0 wrong, None after the first wrong step."""
    first = row["first_error"]
    if first is None or first < 0 or i < first:
        return 1
    return 0 if i == first else None


def new_numbers(row: Row, i: int) -> float:
    """Share of a step's numbers that neither the problem nor an earlier step has."""
    known = set(" ".join([row["prompt"], *row["steps"][:i]]).split())
    numbers = [word for word in row["steps"][i].split() if any(c.isdigit() for c in word)]
    return sum(word not in known for word in numbers) / len(numbers) if numbers else 0.0
