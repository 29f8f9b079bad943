"""One owner's failure as all owners raise it: what is held, what is sent, what is raised."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch

from simmatch.sharding.exchange import IDENTITY
from simmatch.sharding.faults import SharedFault, raise_shared, status_of
from tests.exchanges import ThreadExchange, held, results, run_owners


def test_an_owner_alone_raises_its_exception_where_it_occurs() -> None:
    cause = ZeroDivisionError("mine")
    with pytest.raises(ZeroDivisionError) as caught:
        held(cause, IDENTITY)
    assert caught.value is cause


def test_the_first_exception_is_held_and_interrupts_are_not() -> None:
    def owner(exchange: ThreadExchange) -> Any:
        fault = held(KeyError("first"), exchange)
        with fault:
            raise KeyError("second")
        with pytest.raises(KeyboardInterrupt), fault:
            raise KeyboardInterrupt
        return repr(fault.error)

    assert results(run_owners(2, owner)) == ["KeyError('first')"] * 2


@pytest.mark.parametrize(
    ("error", "kind"), [(OSError("here"), "exception"), (SharedFault("non-finite y", [0]), "non-finite activities")]
)
def test_all_owners_raise_and_the_guilty_one_knows_why(error: Exception, kind: str) -> None:
    def owner(exchange: ThreadExchange) -> None:
        fault = held(error if exchange.rank == 1 else None, exchange)
        statuses = torch.full((3, 4), 2.0)
        fault.mark(statuses[exchange.rank])
        exchange.all_gather(statuses).wait()
        fault.raise_shared(statuses, "activities")

    outcomes = run_owners(3, owner)
    assert [(outcome.kind, outcome.ranks) for outcome in outcomes] == [(kind, [1])] * 3
    assert [outcome.__cause__ for outcome in outcomes] == [None, error, None]
    copied = pickle.loads(pickle.dumps(outcomes[1]))  # it travels between processes
    assert (str(copied), copied.ranks) == (f"{kind} on rank 1", [1])


def test_large_statuses_are_no_fault() -> None:
    """Each is finite; their sum is not."""
    largest = torch.finfo(torch.float32).max
    raise_shared(torch.tensor([largest, largest]), "activities")
    with pytest.raises(SharedFault, match="activities on rank 2"):
        raise_shared(torch.tensor([largest, largest, math.inf]), "activities")


def test_an_exception_comes_before_values_that_are_not_finite() -> None:
    with pytest.raises(SharedFault, match=r"^exception on ranks 1, 3$"):
        raise_shared(torch.tensor([math.nan, -math.inf, 0.0, -math.inf]), "weights")
    with pytest.raises(SharedFault, match=r"^non-finite weights on ranks 0, 2$"):
        raise_shared(torch.tensor([[0.0, math.nan], [1.0, 1.0], [math.inf, 3.0]]), "weights")
    raise_shared(torch.tensor([0.0, 1e30]), "weights")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_status_tells_values_that_are_not_finite(bad: float, dtype: torch.dtype) -> None:
    values, largest = torch.zeros(3, 5, dtype=dtype), torch.finfo(dtype).max
    values[0, 0], values[1, 1] = largest, -largest
    assert status_of(values, values.new_zeros(4, 0)).tolist() == [0.0]
    values[2, 4] = bad
    assert status_of(values.abs(), values).isnan().all()
