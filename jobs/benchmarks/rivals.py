"""Solvers of others for the same problem, at the same residual.

With M + εI = L Lᵀ and b = L⁻¹ d the energy ½ yᵀ(M + εI)y − yᵀd is ½‖Lᵀy − b‖² less a constant: nonnegative least
squares, which SciPy solves column by column with an active set, and scikit-learn by coordinate descent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.benchmarks.problems import Problem, error
from jobs.benchmarks.timing import Spread, alternate
from jobs.reporting import MissingError, Report
from simmatch.config import DynamicsConfig
from simmatch.solvers.dynamics import Dynamics, Solution

RESIDUALS = (1e-2, 1e-3)
MAX_ITERATIONS = 100_000

Row = dict[str, Any]

PENALTY = 0.1
"""Weight of coordinate descent's L1 term over max|d| of the column, relative to the residual aimed at.

It cannot be 0: scikit-learn stops a column by its duality gap, which does not close without the term. It moves the
gradient by as much on the support, so it takes a tenth of what the residual may be.
"""

SWEEPS = 100_000
TOLERANCES = tuple(10.0 ** (1 - exponent / 2) for exponent in range(27))


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """½‖A y − b‖² for every column, scaled so that max|d| = 1.

    Attributes
    ----------
    factor: [K, K], A = Lᵀ, in Fortran order as coordinate descent wants it.
    targets: [K, N], b.
    gram: [K, K], AᵀA = M + εI.
    scale: [N], max|d|; y of the problem is y of this one times `scale`.
    """

    factor: np.ndarray
    targets: np.ndarray
    gram: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, problem: Problem) -> LeastSquares:
        lower = torch.linalg.cholesky(problem.system)
        scale = problem.drive.double().abs().amax(dim=0)
        scale[scale == 0] = 1.0
        targets = torch.linalg.solve_triangular(lower, problem.drive.double() / scale, upper=False)
        return cls(np.asfortranarray(lower.T), targets.numpy(), problem.system.numpy(), scale.numpy())

    def activities(self, scaled: np.ndarray) -> Tensor:
        """Solutions [K, N] of the scaled problem → y [K, N], float64."""
        return torch.from_numpy(scaled * self.scale)


def nnls(squares: LeastSquares) -> np.ndarray:
    """SciPy's active-set solver, one column at a time: exact to rounding, it cannot stop earlier. [K, N]."""
    try:
        from scipy.optimize import nnls as scipy_nnls
    except ImportError:
        raise MissingError("scipy: expected it to be installed for the comparison with scipy.optimize.nnls") from None
    columns = [scipy_nnls(squares.factor, target)[0] for target in squares.targets.T]
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class CoordinateDescent:
    """scikit-learn's `Lasso(positive=True)`, the solver behind `sparse_encode(algorithm="lasso_cd", positive=True)`.

    Attributes
    ----------
    penalty: L1 weight in units of max|d|.
    tolerance: of its duality gap.
    """

    penalty: float
    tolerance: float

    def solve(self, squares: LeastSquares) -> np.ndarray:
        """All columns: [K, N]."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import Lasso

        size = len(squares.factor)
        # Lasso divides the squared error by the number of rows, hence the penalty too
        model = Lasso(
            alpha=self.penalty / size,
            fit_intercept=False,
            precompute=squares.gram,
            max_iter=SWEEPS,
            tol=self.tolerance,
            positive=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the residual is measured instead
            model.fit(squares.factor, squares.targets)
        return np.atleast_2d(model.coef_).T


def tuned_descent(problem: Problem, squares: LeastSquares, residual: float) -> CoordinateDescent | None:
    """Coordinate descent with the loosest of `TOLERANCES` that brings all columns to `residual`; None if none does."""
    for tolerance in TOLERANCES:
        candidate = CoordinateDescent(PENALTY * residual, tolerance)
        if float(problem.residual(squares.activities(candidate.solve(squares))).amax()) <= residual:
            return candidate
    return None


# -- the comparison ----------------------------------------------------------------------------------------------------


def measure_rivals(problems: list[Problem], columns: int, rounds: int, report: Report) -> None:
    """Solvers that users know, at equal residual: they on the first few columns, we on all of them."""
    rows: list[Row] = []
    with report.progress(2 * len(problems)) as step:
        for problem in problems:
            few = problem.first(columns)
            step(f"K = {problem.channels}: scipy.optimize.nnls")
            compared = [against_nnls(problem, few, rounds)]
            step(f"K = {problem.channels}: coordinate descent of scikit-learn")
            compared += [against_descent(problem, few, residual, rounds) for residual in RESIDUALS]
            for row in compared:
                report.row(kind="rival", **row)
            rows += compared
    headings = {
        "channels": "K", "rival": "rival", "tolerance": "residual", "rival_columns_per_second": "theirs",
        "rival_error": "their error", "columns_per_second": "ours", "error": "our error", "speedup": "times faster",
        "speedup_min": "min", "speedup_max": "max",
    }  # fmt: skip
    report.rows_table("Independent solvers at equal residual (columns/s)", headings, rows)


def against_nnls(problem: Problem, few: Problem, rounds: int) -> Row:
    """The active set ends at rounding error, and so do we, in float64."""
    squares = LeastSquares.of(few)
    theirs = squares.activities(nnls(squares))
    residual = max(float(few.residual(theirs).amax()), 1e-10)
    double = Problem(problem.lateral.double(), problem.drive.double())
    return _against("scipy.optimize.nnls", lambda: nnls(squares), theirs, double, few, residual, rounds)


def against_descent(problem: Problem, few: Problem, residual: float, rounds: int) -> Row:
    squares = LeastSquares.of(few)
    name = "sklearn coordinate descent"
    descent = tuned_descent(few, squares, residual)
    if descent is None:
        return {"channels": problem.channels, "rival": name, "tolerance": residual} | dict.fromkeys(
            ("rival_columns_per_second", "rival_error", "columns_per_second", "error", "speedup", "speedup_min",
             "speedup_max")
        )  # fmt: skip
    theirs = squares.activities(descent.solve(squares))
    row = _against(name, lambda: descent.solve(squares), theirs, problem, few, residual, rounds)
    return row | {"penalty_over_drive": descent.penalty, "rival_tolerance": descent.tolerance}


def _against(
    name: str,
    rival: Callable[[], object],
    theirs: Tensor,
    problem: Problem,
    few: Problem,
    residual: float,
    rounds: int,
) -> Row:
    """Columns/s of both in turns; each on as many columns as suits it."""
    config = DynamicsConfig(tolerance=residual, max_iterations=MAX_ITERATIONS)
    solver = Dynamics(config, problem.rows, alone=True)

    def own() -> Solution:
        return solver.solve(problem.drive, problem.lateral, problem.bound)

    solution, exact = own(), few.exact()
    candidates = {"rival": rival, "own": own}
    timings = alternate(candidates, rounds)
    columns, their_columns = problem.drive.shape[1], few.drive.shape[1]
    pairs = zip(timings.seconds["rival"], timings.seconds["own"], strict=True)
    speedup = Spread.of([other / their_columns / (own / columns) for other, own in pairs])
    return {
        "channels": problem.channels,
        "rival": name,
        "solver": config.solver_on("cpu", alone=True),
        "tolerance": residual,
        "rival_columns": their_columns,
        "rival_residual": few.residual(theirs).amax(),
        "rival_error": error(theirs, exact),
        **timings.rate("rival", their_columns).fields("rival_columns_per_second"),
        "dtype": str(problem.drive.dtype).removeprefix("torch."),
        "columns": columns,
        "residual": problem.residual(solution.y).amax(),
        "error": error(solution.y[:, :their_columns], exact),
        **timings.rate("own", columns).fields("columns_per_second"),
        **speedup.fields("speedup"),
    }
