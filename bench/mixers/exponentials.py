"""1 / x as a short sum of exponentials, which splits 1 / (a + b) into a product of a part of a and a part of b.

1 / x is the integral over t > 0 of exp(-t x), so a few rates t and weights w do for a bounded range of x (Braess and
Hackbusch, "Approximation of 1/x by exponential sums in [1, infinity)", 2005). All terms are positive: nothing cancels.
Axes: X places x, M terms.
"""

from functools import lru_cache

import numpy as np
from scipy.optimize import nnls

TOLERANCE = 1e-4
"""Relative, of the sum for 1 / x: far below the rounding of bf16, 4e-3. Its derivative has ten times that."""
ROUNDS = 60  # of the fit; the error stops falling before


@lru_cache
def exponentials(bound: float) -> tuple[tuple[float, float], ...]:
    """(rate, weight) of the fewest terms found whose sum of weight * exp(-rate * x) is 1 / x within `TOLERANCE` for x
    from 2 exp(-bound) to 2 exp(bound): 12 for a bound of 4."""
    terms = 1 + int(2.4 * bound)
    while True:
        rates_M, weights_M = _fit(bound, terms)
        value, derivative = errors(bound, rates_M, weights_M)
        if max(value, derivative / 10) <= TOLERANCE:
            return tuple(zip(rates_M.tolist(), weights_M.tolist(), strict=True))
        terms += 1


def errors(bound: float, rates_M: np.ndarray, weights_M: np.ndarray) -> tuple[float, float]:
    """The largest relative errors of the sum and of its derivative, on a grid much finer than their waves."""
    wrong_2X, _ = _residuals(_range(bound, 400 * len(rates_M)), np.log(rates_M), np.log(weights_M))
    value, derivative = np.abs(wrong_2X.reshape(2, -1)).max(1)
    return float(value), float(10 * derivative)


def _range(bound: float, steps: int) -> np.ndarray:
    return 2 * np.exp(np.linspace(-bound, bound, steps + 1))[:, None]


def _residuals(x_X1: np.ndarray, rate_M: np.ndarray, weight_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of logarithms: relative errors of the sum and, divided by ten, of its derivative, and their own derivatives."""
    power_XM = x_X1 * np.exp(rate_M)
    term_XM = x_X1 * np.exp(weight_M - power_XM)
    slope_XM = power_XM * term_XM / 10
    wrong_2X = np.concatenate([term_XM.sum(1) - 1, slope_XM.sum(1) - 0.1])
    by_rate = np.concatenate([-power_XM * term_XM, slope_XM - power_XM * slope_XM])
    return wrong_2X, np.concatenate([by_rate, np.concatenate([term_XM, slope_XM])], 1)


def _fit(bound: float, terms: int) -> tuple[np.ndarray, np.ndarray]:
    """Rates and weights whose largest error is near the least: Gauss-Newton on their logarithms from geometric rates,
    with weights of the residuals that grow where they are large (Lawson's rule)."""
    x_X1 = _range(bound, 30 * terms)
    start_M = np.linspace(np.log(0.15 / x_X1[-1, 0]), np.log(4 / x_X1[0, 0]), terms)
    found_M, _ = nnls(x_X1 * np.exp(-x_X1 * np.exp(start_M)), np.ones(len(x_X1)), maxiter=100 * terms)
    logs = np.concatenate([start_M, np.log(np.maximum(found_M, 1e-3 * np.exp(start_M)))])
    importance_2X, least, best = np.ones(2 * len(x_X1)), np.inf, logs
    for step in range(3 * ROUNDS):
        wrong_2X, slopes = _residuals(x_X1, logs[:terms], logs[terms:])
        largest = np.abs(wrong_2X).max()
        if largest < least:
            least, best = largest, logs
        if step % 3 == 2:
            importance_2X = importance_2X * (np.abs(wrong_2X) / largest) + 1e-6 * importance_2X.mean()
        root_2X = np.sqrt(importance_2X / importance_2X.mean())
        slopes = slopes * root_2X[:, None]
        square = slopes.T @ slopes
        damped = square + 1e-10 * np.trace(square) / len(square) * np.eye(len(square))
        change = np.linalg.solve(damped, -slopes.T @ (root_2X * wrong_2X))
        logs = logs + change * min(1, 0.5 / np.abs(change).max())
    return np.exp(best[:terms]), np.exp(best[terms:])
