"""Log-odds, their loss, and logistic regression on targets between 0 and 1."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["cross_entropy", "log_odds", "logistic_regression", "probability"]


def log_odds(probabilities: NDArray[np.float64], smallest: float) -> NDArray[np.float64]:
    """Of probabilities kept as far as `smallest` away from 0 and 1."""
    inside = np.clip(probabilities, smallest, 1 - smallest)
    return np.asarray(np.log(inside / (1 - inside)))


def probability(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of `log_odds`."""
    return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -30.0, 30.0))))


def cross_entropy(predicted: NDArray[np.float64], target: NDArray[np.float64], smallest: float) -> NDArray[np.float64]:
    """Log loss of each prediction, kept as `log_odds` does, in nats; the target is in [0, 1], or NaN for unknown."""
    inside = np.clip(predicted, smallest, 1 - smallest)
    return -(target * np.log(inside) + (1 - target) * np.log1p(-inside))


def logistic_regression(
    x: NDArray[np.float64],
    target: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    penalty: float = 1.0,
    solver: Literal["lbfgs", "newton-cholesky"] = "lbfgs",
) -> tuple[NDArray[np.float64], float]:
    """Coefficients and intercept, ridge-penalised; a row counts as good by its target, and as bad by the rest.

    Args:
        x: (n, d).
        target: (n,) in [0, 1], at least two different values, or none that is certain.
        solver: newton-cholesky for few features, lbfgs for many.
    """
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression

    doubled, labels = np.vstack([x, x]), np.repeat([1, 0], len(x))
    share = np.concatenate([target, 1 - target])
    if weights is not None:
        share *= np.concatenate([weights, weights])
    used = share > 0
    model = LogisticRegression(C=1 / penalty, solver=solver, max_iter=500)
    # checks of parameters would take as long as the fit of a small table
    with config_context(skip_parameter_validation=True, assume_finite=True):
        model.fit(doubled[used], labels[used], sample_weight=share[used])
    return np.asarray(model.coef_[0]), float(model.intercept_[0])
