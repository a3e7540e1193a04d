"""What the report's statistics really do on simulated tables: error rates, coverages, power.

Command: python benchmarks/calibration.py [--tables 4000] [--out results/calibration]
Prints a table and writes it to table.md in the folder; about a minute on one core. The same numpy gives the same bytes.
A simulated value is arm + seed + noise; seeds have SD 2, noise SD 1, so that paired differences have SD sqrt 2. Each
row compares a share with what theory says, within 3 standard errors of the simulation.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.report import stats, stats_bootstrap, stats_suite, stats_tests

ARMS, ALPHA, LEVEL = 14, 0.05, 0.95
HOME = Path(__file__).parents[1] / "results" / "calibration"
NOISE = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy-tailed (t, 3 df)": lambda rng, shape: rng.standard_t(3, shape) / math.sqrt(3),
    "skewed (exponential)": lambda rng, shape: rng.standard_exponential(shape) - 1,
}


@dataclass(frozen=True)
class Row:
    """A measured share of `trials`, and the range that theory gives it; a range of 0 to 1 claims nothing."""

    what: str
    measured: float
    trials: int
    low: float
    high: float

    @property
    def error(self) -> float:
        """Standard error of the simulation, at the end of the range that is nearer."""
        near = min(max(self.measured, self.low), self.high)
        return math.sqrt(max(near * (1 - near), 1 / self.trials) / self.trials)

    @property
    def holds(self) -> bool:
        return self.low - 3 * self.error <= self.measured <= self.high + 3 * self.error


def simulated(rng: np.random.Generator, tables: int, arms: int, seeds: int, noise: str) -> np.ndarray:
    """Tables without any true effect, `NAS`."""
    return 2 * rng.standard_normal((tables, 1, seeds)) + NOISE[noise](rng, (tables, arms, seeds))


def rate(what: str, hits_N: np.ndarray, low: float, high: float) -> Row:
    return Row(what, float(np.mean(hits_N)), hits_N.size, low, high)


def false_alarms(tables: int, noises: list[str]) -> list[Row]:
    """Share of tables of 14 equal arms in which any arm is told apart from the reference, for each way to test."""
    rows = []
    for noise in noises:
        for seeds in (5, 8, 10):
            rng = np.random.default_rng([1, seeds])
            values_NAS = simulated(rng, tables, ARMS, seeds, noise)
            found = stats.compare(values_NAS, stats.against(ARMS, 0), ALPHA)
            title = f"{seeds} seeds, {noise} noise:"
            t_claim = ALPHA if noise == "normal" else 1
            rows += [
                rate(f"{title} the report's rule", found.significant_P.any(-1), 0, t_claim),
                rate(f"{title} paired t, Holm", (found.adjusted_P <= ALPHA).any(-1), 0, t_claim),
                rate(f"{title} sign-flip, Holm", (found.flip_adjusted_P <= ALPHA).any(-1), 0, ALPHA),
                rate(f"{title} block model, Holm", (found.pooled_adjusted_P <= ALPHA).any(-1), 0, t_claim),
            ]
    return rows


def letter_alarms(tables: int) -> list[Row]:
    """Share of tables of 14 equal arms with more than one significance group."""
    values_NAS = simulated(np.random.default_rng([1, 12]), tables, ARMS, 12, "normal")
    more_N = np.array([len(set(stats.groups(values_AS, ALPHA)[0])) > 1 for values_AS in values_NAS])
    return [rate("12 seeds, normal noise: letters over all 91 pairs", more_N, 0, ALPHA)]


def null_arm(tables: int) -> list[Row]:
    """Share of tables in which an A/A arm, its own family of one, is flagged."""
    rows = []
    for seeds in (6, 8, 10):
        values_NAS = simulated(np.random.default_rng([2, seeds]), tables, 2, seeds, "normal")
        found = stats.compare(values_NAS, [(1, 0)], ALPHA)
        rows.append(rate(f"{seeds} seeds, {tables} tables", found.significant_P[:, 0], ALPHA, ALPHA))
    return rows


def powers(tables: int) -> list[Row]:
    """Share of tables in which a true effect on one arm is found; theory is exact alone, a lower bound in a family."""
    rows = []
    for seeds, effect in ((10, 1.0), (10, 1.5), (10, 2.0), (12, 1.5)):
        values_NAS = simulated(np.random.default_rng([3, seeds]), tables, ARMS, seeds, "normal")
        values_NAS[:, 1] += effect * math.sqrt(2)  # SDs of paired differences
        for pairs in ([(1, 0)], stats.against(ARMS, 0)):
            found = stats.compare(values_NAS, pairs, ALPHA).significant_P[:, 0]
            theory = stats_tests.power(effect, seeds, len(pairs), ALPHA)
            family = "alone" if len(pairs) == 1 else f"among {len(pairs)}"
            # Holm's later steps are easier than the first: a little above theory is right.
            high = theory if len(pairs) == 1 else min(1, theory + 0.03)
            rows.append(rate(f"{seeds} seeds, effect {effect} SD, {family}: theory {theory:.3f}", found, theory, high))
    return rows


def coverages(tables: int, resamples: int) -> list[Row]:
    """Share of nominal 95 % intervals of a paired difference that hold the truth. Bootstraps claim nothing."""
    rows = []
    for seeds in (3, 5, 8, 10, 20):
        rng = np.random.default_rng([4, seeds])
        values_NAS = simulated(rng, tables, ARMS, seeds, "normal")
        one = stats.compare(values_NAS, [(1, 0)], 1 - LEVEL)
        differences_NS = values_NAS[:, 1] - values_NAS[:, 0]
        weights_RS = stats_bootstrap.draws(seeds, resamples, rng)
        percentile = stats_bootstrap.percentile(differences_NS, weights_RS, LEVEL)
        bca = stats_bootstrap.bca(differences_NS, weights_RS, LEVEL)
        rows += [
            rate(f"{seeds} seeds: t", holds(one.difference_P, 0), LEVEL, LEVEL),
            rate(f"{seeds} seeds: block model of {ARMS} arms", holds(one.pooled_P, 0), LEVEL, LEVEL),
            rate(
                f"{seeds} seeds: percentile",
                holds(percentile, 0),
                0,
                1,
            ),
            rate(f"{seeds} seeds: BCa", holds(bca, 0), 0, 1),
        ]
    return rows


def holds(interval: stats_tests.Interval, truth: float) -> np.ndarray:
    return (interval.low <= truth) & (truth <= interval.high)


def suites(tables: int, resamples: int) -> list[Row]:
    """Coverage of the hierarchical bootstrap: 3 tasks, 3 replicas, 400 items; seeds, replicas and items all vary."""
    rows, tasks, replicas, items, together = [], 3, 3, 400, 50
    for seeds in (3, 5, 10, 20):
        rng, hits = np.random.default_rng([5, seeds]), []
        for _ in range(max(1, tables // together)):
            seed_NS11 = 0.04 * rng.standard_normal((together, seeds, 1, 1))
            suite = []
            for _ in range(tasks):
                item_N11I = rng.uniform(-0.2, 0.2, (together, 1, 1, items))
                replica_NSF1 = 0.04 * rng.standard_normal((together, seeds, replicas, 1))
                chance_NSFI = 0.7 + seed_NS11 + replica_NSF1 + item_N11I
                right_NSFI = rng.random(chance_NSFI.shape) < chance_NSFI
                suite.append(stats_bootstrap.Outcomes(right_NSFI[..., None], stats_bootstrap.mean_of_items))
            interval = stats_bootstrap.of_resamples(*stats_bootstrap.hierarchical(suite, resamples, rng), LEVEL)
            hits.append(holds(interval, 0.7))
        rows.append(rate(f"{seeds} seeds: hierarchical bootstrap of a suite", np.concatenate(hits), 0, 1))
    return rows


def others(tables: int) -> list[Row]:
    """Equivalence at its margin, exact share of wins, Kendall's tau between two noisy orders."""
    rows = []
    for seeds in (5, 10):
        rng = np.random.default_rng([6, seeds])
        differences_NS = 1 + 0.7 * rng.standard_normal((tables, seeds))
        equal = stats_tests.equivalence(differences_NS, 1.0, ALPHA).equivalent
        rows.append(rate(f"{seeds} seeds: equivalent although the difference is the margin", equal, 0, ALPHA))
        some_NS = differences_NS[: min(tables, 2000)] - 1
        inside = [holds(stats_suite.wins(row_S, LEVEL), 0.5) for row_S in some_NS]
        rows.append(rate(f"{seeds} seeds: interval of the share of wins", np.array(inside), LEVEL, 1))
    for arms in (10, 14):
        rng = np.random.default_rng([7, arms])
        first_NA, own_NA = rng.standard_normal((2, min(tables, 2000), arms))
        second_NA = 0.6 * first_NA + 0.8 * own_NA
        truth = 2 / math.pi * math.asin(0.6)
        found = [stats_suite.kendall(a, b, LEVEL) for a, b in zip(first_NA, second_NA, strict=True)]
        inside = np.array([f.low <= truth <= f.high for f in found])
        rows.append(rate(f"{arms} arms: Fieller's interval of tau-b, true tau {truth:.2f}", inside, 0.93, 0.97))
    return rows


def measure(tables: int, resamples: int) -> dict[str, list[Row]]:
    alarms = [*false_alarms(tables, list(NOISE)), *letter_alarms(tables // 10)]
    return {
        "Family-wise error at 0.05: 13 equal arms against a reference": alarms,
        "A/A arm flagged at 0.05": [*null_arm(200), *null_arm(tables)],
        "Power": powers(tables),
        "Coverage of 95 % intervals": [*coverages(tables, resamples), *suites(tables // 5, resamples // 2)],
        "Other rates": others(tables),
    }


def claim(row: Row) -> str:
    if (row.low, row.high) == (0, 1):
        return "no claim"
    if row.low == row.high:
        return f"{row.low:.3f}"
    return f"at most {row.high:.2f}" if row.low == 0 else f"{row.low:.3f} to {row.high:.3f}"


def markdown(found: dict[str, list[Row]], command: str) -> str:
    lines = [
        "# Calibration of the report's statistics",
        "",
        f"Simulated tables without real data: `{command}`. SE is that of the simulation; a claim holds within 3 SE.",
    ]
    for title, rows in found.items():
        width = max(len(row.what) for row in rows)
        lines += ["", f"## {title}", "", f"| {'what':{width}} | measured |    SE | claim          | holds |"]
        lines.append(f"| :{'-' * (width - 1)} | -------: | ----: | :------------- | :---- |")
        for row in rows:
            verdict = "-" if claim(row) == "no claim" else "yes" if row.holds else "NO"
            lines.append(
                f"| {row.what:{width}} | {row.measured:8.3f} | {row.error:.3f} | {claim(row):14} | {verdict:5} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=4_000)
    parser.add_argument("--resamples", type=int, default=2_000)
    parser.add_argument("--out", type=Path, default=HOME)
    options = parser.parse_args()
    command = f"python benchmarks/calibration.py --tables {options.tables} --resamples {options.resamples}"
    text = markdown(measure(options.tables, options.resamples), command)
    print(text, end="")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
