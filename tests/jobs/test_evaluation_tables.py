"""Estimates against hand-computed ones, tables against golden ones, metric names against MLflow's rules."""

from __future__ import annotations

import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from io import StringIO

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from rich.console import Console

from jobs.evaluation.results import RowResult, by_row, estimates, long_table, of_measure
from jobs.evaluation.tables import comparison_tables, markdown, metrics
from jobs.reporting import Table


def result(row: str = "nsm", seed: int = 0, **fields) -> RowResult:
    values = {
        "settings": "as configured",
        "features": 1024,
        "parameters_trained": 5000,
        "parameters_inference": 1664,
        "operations": 1_250_000,
        "fit_seconds": 30.0,
        "images_per_second": 2000.0,
    }
    return RowResult(row=row, seed=seed, **(values | fields))


def text_of(known: pd.DataFrame) -> str:
    return markdown(comparison_tables(known))


def shown(table: Table, width: int = 160, *, terminal: bool = False) -> list[str]:
    """The lines of a table on a terminal or in a file of this width; no line may be wider than a terminal."""
    console = Console(file=StringIO(), width=width, force_terminal=terminal, no_color=True, legacy_windows=False)
    table.show(console)
    text = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    lines = text.splitlines()
    if terminal:
        assert max(map(len, lines), default=0) <= width
    return lines


def many_rows(count: int = 16) -> pd.DataFrame:
    """As many rows as an evaluation has, with everything that a row may have, and names that are long."""
    draw = random.Random(1)

    def row(index: int, seed: int) -> RowResult:
        def some(*keys: str) -> dict[str, float]:
            return {key: draw.uniform(0.5, 1.0) for key in keys}

        return result(
            f"similarity matching, supervised, no. {index}" if index % 2 else f"row {index}",
            seed,
            accuracy=some("10", "50", "100", "1000", "all"),
            kernel=some("10", "50", "100", "1000", "all"),
            decode=draw.random(),
            neighbours=draw.random(),
            fit_seconds=draw.uniform(100, 2000),
            images_per_second=draw.uniform(100, 20000),
            operations=10**8,
            parameters_trained=1_234_567,
            parameters_inference=234_567,
            parameters_readout=20_490,
            active_fraction=[0.12, 0.1, 0.17],
            corruptions=some("clean", "fog", "shear"),
            transfer=some("10", "50", "100", "all"),
            outliers=some("0", "0.01", "0.05"),
        )

    return estimates([row(index, seed) for index in range(count) for seed in range(3)])


# -- estimates ---------------------------------------------------------------------------------------------------------


def one(known: pd.DataFrame, measure: str, key: str = "", row: str = "nsm") -> tuple[float, float, int]:
    """(mean, standard deviation, count) of a value."""
    mean, std, count = known.loc[(row, measure, key)]
    return mean, std, int(count)


def test_a_line_for_each_value() -> None:
    table = long_table([result(seed=3, accuracy={"10": 0.5, "all": 0.75}, decode=0.25, active_fraction=[0.1, 0.2])])
    lines = {(measure, key): value for _, _, measure, key, value in table.itertuples(index=False)}
    assert lines == {
        ("fit_seconds", ""): 30.0,
        ("images_per_second", ""): 2000.0,
        ("parameters_trained", ""): 5000.0,
        ("parameters_inference", ""): 1664.0,
        ("parameters_readout", ""): 0.0,
        ("operations", ""): 1.25e6,
        ("accuracy", "10"): 0.5,
        ("accuracy", "all"): 0.75,
        ("decode", ""): 0.25,
        ("active_fraction", "0"): 0.1,
        ("active_fraction", "1"): 0.2,
    }
    assert set(table["row"]) == {"nsm"}
    assert set(table["seed"]) == {3}


def test_mean_and_standard_deviation_by_hand() -> None:
    """0.7, 0.8, 0.6: mean 0.7, squared deviations 0, 0.01, 0.01, over 2: 0.01. 20, 40: mean 30, deviation √200."""
    results = [
        result(seed=0, accuracy={"10": 0.7}, fit_seconds=20.0, decode=0.5, active_fraction=[0.1, 0.3]),
        result(seed=1, accuracy={"10": 0.8}, fit_seconds=40.0, active_fraction=[0.2, 0.5]),
        result(seed=2, accuracy={"10": 0.6}, fit_seconds=30.0, neighbours=0.25, active_fraction=[0.3, 0.7]),
    ]
    known = estimates(results)
    assert list(known.index.unique("row")) == ["nsm"]
    assert one(known, "fit_seconds")[2] == 3
    assert one(known, "accuracy", "10") == pytest.approx((0.7, 0.1, 3), abs=1e-15)
    active = of_measure(known, "active_fraction")
    assert list(active["mean"]) == pytest.approx([0.2, 0.5])
    assert list(active["std"]) == pytest.approx([0.1, 0.2])
    assert one(known, "decode") == pytest.approx((0.5, math.nan, 1), nan_ok=True)
    assert one(known, "neighbours") == pytest.approx((0.25, math.nan, 1), nan_ok=True)
    assert one(known, "parameters_trained") == (5000.0, 0.0, 3)
    two = estimates(results[:2])
    assert one(two, "fit_seconds") == pytest.approx((30.0, math.sqrt(200), 2))
    assert one(estimates(results[:1]), "accuracy", "10") == pytest.approx((0.7, math.nan, 1), nan_ok=True)


def test_corruptions_are_averaged_within_a_seed() -> None:
    """Seed 0: mean 0.5 of 0.4 and 0.6, clean 0.8, ratio 0.625; seed 1: 0.7, 0.875, 0.8. Clean is none of them."""
    results = [
        result(seed=0, corruptions={"clean": 0.8, "fog": 0.4, "shear": 0.6}),
        result(seed=1, corruptions={"clean": 0.875, "fog": 0.6, "shear": 0.8}),
        result(seed=2),
    ]
    known = estimates(results)
    assert list(of_measure(known, "corruptions").index.unique("key")) == ["clean", "fog", "shear"]
    assert one(known, "corruptions", "fog")[0] == pytest.approx(0.5)
    assert one(known, "corrupted") == pytest.approx((0.6, 0.1 * math.sqrt(2), 2))
    assert one(known, "relative") == pytest.approx(((0.625 + 0.8) / 2, 0.175 / math.sqrt(2), 2))


@pytest.mark.parametrize(
    ("corruptions", "corrupted"), [({}, []), ({"clean": 0.9}, []), ({"fog": 0.5}, [0.5]), ({"clean": 0, "fog": 0}, [0])]
)
def test_no_ratio_without_both(corruptions: dict[str, float], corrupted: list[float]) -> None:
    known = estimates([result(corruptions=corruptions)])
    assert list(by_row(known, "corrupted")["mean"]) == corrupted
    assert by_row(known, "relative").empty


def test_rows_keep_their_order_and_budgets_rise() -> None:
    """Whatever order results and budgets arrive in; a budget may be missing in a row, or with a seed."""
    results = [
        result("b", 1, accuracy={"all": 0.9, "1000": 0.8, "50": 0.6}, transfer={"all": 0.3, "9": 0.1}),
        result("a", 1, accuracy={"100": 0.7, "10": 0.5}, outliers={"0.05": 0.5, "0": 0.7, "0.01": 0.6}),
        result("b", 0, accuracy={"10": 0.4, "1000": 0.6}),
    ]
    known = estimates(results)
    assert list(known.index.unique("row")) == ["b", "a"]
    assert list(of_measure(known, "accuracy").xs("b", level="row").index) == ["10", "50", "1000", "all"]
    assert list(of_measure(known, "transfer").xs("b", level="row").index) == ["9", "all"]
    assert list(of_measure(known, "outliers").xs("a", level="row").index) == ["0", "0.01", "0.05"]
    assert list(of_measure(known, "accuracy").xs("b", level="row")["count"]) == [1, 1, 2, 1]
    heading = next(line for line in shown(comparison_tables(known)[0]) if "all" in line)
    assert heading.split() == ["seeds", "10", "50", "100", "1000", "all"]


def test_a_row_may_have_changed_its_layers() -> None:
    known = estimates([result(seed=0, active_fraction=[0.1]), result(seed=1, active_fraction=[0.3, 0.5])])
    assert list(of_measure(known, "active_fraction")["mean"]) == pytest.approx([0.2, 0.5])


def test_one_result_per_row_and_seed() -> None:
    with pytest.raises(ValueError, match="expected one per row and seed, got two of 'nsm', seed 4"):
        estimates([result(seed=4), result("other", 4), result(seed=4)])


# -- tables ------------------------------------------------------------------------------------------------------------

GOLDEN = """\
Test accuracy by labels per class; mean ± standard deviation over seeds:

|  | seeds | 10 | all | nearest column of V | 10 nearest images |
| --- | ---: | ---: | ---: | ---: | ---: |
| nsm | 2 | 0.762 ± 0.004 | 0.905 | 0.880 ± 0.014 | 0.851 |
| a \\| b | 1 | 0.500 | – | – | – |

Test accuracy of a kernel readout (closed form), by labels per class:

|  | 10 | all |
| --- | ---: | ---: |
| nsm | 0.770 ± 0.014 | 0.920 |

Cost: parameters (trained, for inference, of the readout); multiply–adds (ops) per image; active share by layer:

|  | learn, s | encode, images/s | trained | inference | readout | million ops | active, % |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| nsm | 30.0 ± 14.1 | 2,000 | 5,500 ± 707 | 1,664 | 10,250 | 1.25 | 17, 9.2 |
| a \\| b | 123 | – | 0 | 0 | 0 | 0 | – |

Test accuracy under corruptions (mean), and after learning from images of which a share is noise:

|  | clean | corrupted | corrupted / clean | 0 % noise | 2.5 % noise |
| --- | ---: | ---: | ---: | ---: | ---: |
| nsm | 0.900 ± 0.000 | 0.675 ± 0.035 | 0.750 ± 0.039 | 0.850 | 0.800 |

Test accuracy on a data set that was not learnt from, by labels per class:

|  | 5 | all |
| --- | ---: | ---: |
| a \\| b | 0.333 | 0.667 |
"""


def golden_rows() -> pd.DataFrame:
    common = {"parameters_readout": 10_250}
    return estimates(
        [
            result(
                seed=0,
                accuracy={"10": 0.7593, "all": 0.905},
                kernel={"10": 0.76, "all": 0.92},
                decode=0.87,
                neighbours=0.851,
                fit_seconds=20.0,
                active_fraction=[0.16, 0.094],
                corruptions={"clean": 0.9, "fog": 0.6, "shear": 0.7},
                outliers={"0": 0.85, "0.025": 0.8},
                **common,
            ),
            result(
                seed=1,
                accuracy={"10": 0.7647},
                kernel={"10": 0.78},
                decode=0.89,
                fit_seconds=40.0,
                parameters_trained=6000,
                active_fraction=[0.18, 0.09],
                corruptions={"clean": 0.9, "fog": 0.65, "shear": 0.75},
                **common,
            ),
            result(
                "a | b",
                accuracy={"10": 0.5},
                fit_seconds=123.4,
                parameters_trained=0,
                parameters_inference=0,
                operations=0,
                transfer={"5": 1 / 3, "all": 2 / 3},
            ),
        ]
    )


def test_golden_markdown() -> None:
    assert text_of(golden_rows()) == GOLDEN


def words_of(cells: Iterable[str]) -> list[str]:
    """Words as a terminal has them: the spread is glued to its sign."""
    return [word for cell in cells for word in cell.replace("± ", "±").split()]


def markdown_cells(text: str) -> list[list[str]]:
    """Cells of all lines of tables, without rules."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_a_terminal_shows_the_cells_of_the_markdown() -> None:
    lines = [line for table in comparison_tables(golden_rows()) for line in shown(table)]
    for row in ("nsm", "a | b"):
        ours = [line.split() for line in lines if line.startswith(f" {row} ")]
        assert ours == [words_of(cells) for cells in markdown_cells(GOLDEN) if cells[0] == row]


@pytest.mark.parametrize("width", [92, 100, 130, 160])
def test_many_rows_fit_a_terminal(width: int) -> None:
    """No number, no word of a heading and no name is cut: every word of the markdown is there as often."""
    rows = many_rows()
    lines = [line for table in comparison_tables(rows) for line in shown(table, width, terminal=True)]
    given = Counter(word for line in lines for word in line.split())
    wanted = Counter(word for cells in markdown_cells(text_of(rows)) for word in words_of(cells))
    assert len(wanted) > 400
    assert wanted <= given


def test_rows_without_anything_but_costs() -> None:
    accuracy, cost = comparison_tables(estimates([result()]))
    assert [list(row) for row in accuracy.rows] == [["nsm", "1"]]
    assert cost.title.startswith("Cost")
    assert comparison_tables(estimates([])) == []
    assert metrics(estimates([])) == {}


def test_names_are_no_markup() -> None:
    [table, _] = comparison_tables(estimates([result("[red]nsm[/red]", accuracy={"all": 0.5})]))
    assert any(line.split()[0] == "[red]nsm[/red]" for line in shown(table) if line.strip())


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_are_the_estimates() -> None:
    values = metrics(golden_rows())
    expected = {
        "nsm/accuracy/10": 0.762,
        "nsm/accuracy_spread/10": 0.0054 / math.sqrt(2),
        "nsm/accuracy/all": 0.905,
        "nsm/kernel/10": 0.77,
        "nsm/kernel_spread/10": 0.02 / math.sqrt(2),
        "nsm/kernel/all": 0.92,
        "nsm/decode": 0.88,
        "nsm/decode_spread": 0.02 / math.sqrt(2),
        "nsm/neighbours": 0.851,
        "nsm/corruptions/clean": 0.9,
        "nsm/corruptions_spread/clean": 0.0,
        "nsm/corruptions/fog": 0.625,
        "nsm/corruptions_spread/fog": 0.05 / math.sqrt(2),
        "nsm/corruptions/shear": 0.725,
        "nsm/corruptions_spread/shear": 0.05 / math.sqrt(2),
        "nsm/corrupted": 0.675,
        "nsm/corrupted_spread": 0.05 / math.sqrt(2),
        "nsm/relative": 0.75,
        "nsm/relative_spread": 0.05 / 0.9 / math.sqrt(2),
        "nsm/outliers/0": 0.85,
        "nsm/outliers/0.025": 0.8,
        "nsm/fit_seconds": 30.0,
        "nsm/images_per_second": 2000.0,
        "nsm/parameters_trained": 5500.0,
        "nsm/parameters_inference": 1664.0,
        "nsm/parameters_readout": 10250.0,
        "nsm/operations": 1.25e6,
        "nsm/active_fraction/0": 0.17,
        "nsm/active_fraction/1": 0.092,
    }
    assert {name: value for name, value in values.items() if name.startswith("nsm/")} == pytest.approx(expected)
    assert values["a _ b/transfer/5"] == pytest.approx(1 / 3)


STRANGE = [
    "nsm",
    "k-means (α = 3)",
    "../..",
    "a/b",
    "a|b",
    "a:b",
    "/",
    "",
    " ",
    ".",
    "x" * 400,
    "x" * 401,
    "ä\nö",
    "a b",
]


def accepted(values: dict[str, float]) -> None:
    """MLflow's own check of a batch of metrics: characters, paths and lengths of names, values."""
    from mlflow.entities import Metric
    from mlflow.utils.validation import _validate_batch_log_data

    _validate_batch_log_data([Metric(name, value, 0, 0) for name, value in values.items()], [], [])


def test_mlflow_takes_every_name() -> None:
    """And no row hides another's metrics."""
    accuracies = {row: 0.1 + 0.01 * index for index, row in enumerate(STRANGE)}
    values = metrics(estimates([result(row, accuracy={"10": value}) for row, value in accuracies.items()]))
    accepted(values)
    recorded = [value for name, value in values.items() if name.endswith("/accuracy/10")]
    assert recorded == list(accuracies.values())
    with pytest.raises(MlflowException):
        accepted({"k-means (α = 3)/accuracy/10": 0.5})


def test_mlflow_takes_what_an_evaluation_records() -> None:
    values = metrics(many_rows())
    accepted(values)
    assert "row 0/accuracy/1000" in values
    corrupted = statistics.fmean(values[f"row 0/corruptions/{each}"] for each in ("fog", "shear"))
    assert corrupted == pytest.approx(values["row 0/corrupted"])
