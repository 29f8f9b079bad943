"""Who holds up the rest: found from how many exchanges of each connection every rank has started.

A rank that has started more exchanges of a connection than another waits for it, or will. Who waits for a rank that
itself waits does so for the same cause: following them leads to ranks that wait for nobody. Stages of a pipeline may
be at different updates, so counts are only compared within a connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.messages import RankStatus

LINK = "the link"
"""How the names of connections between two stages begin."""

PART_OF_WAIT = 0.5
"""A rank that has been idle for so much of the time for which others have waited does not move."""


@dataclass(frozen=True)
class Cause:
    """Ranks for which others wait.

    Attributes
    ----------
    ranks: these ranks, in order; the others wait for an exchange that they have not started.
    connection, exchange: the name of the connection, see `RankStatus`, and the number of that exchange.
    """

    ranks: tuple[RankStatus, ...]
    connection: str
    exchange: int

    @property
    def is_link(self) -> bool:
        """Whether the others wait for another stage, which may take its time as long as it works."""
        return self.connection.startswith(LINK)

    def __str__(self) -> str:
        return f"exchange {self.exchange}{f' of {self.connection}' if self.connection else ''}"


def cause_of(statuses: Sequence[RankStatus], waiting: Sequence[int]) -> Cause | None:
    """For whom these ranks wait; None where they are ahead of nobody.

    A rank that moves holds up nobody for ever: it is the cause only if no other can be. If several might be, it is the
    one that has been idle for the longest time.

    >>> ahead, behind = (RankStatus(rank, False, None, [], [], {"": number}) for rank, number in ((0, 5), (1, 4)))
    >>> cause = cause_of([ahead, behind], waiting=[0])
    >>> [status.rank for status in cause.ranks], str(cause)
    ([1], 'exchange 5')
    """
    following = [status for status in statuses if status.rank in waiting]
    seen, reached = set(waiting), list[tuple[str, RankStatus]]()
    still_s = PART_OF_WAIT * min((status.idle_s for status in following), default=0.0)
    for status in following:  # grows
        for connection, other in _behind(status, statuses):
            reached.append((connection, other))
            if other.rank not in seen:
                seen.add(other.rank)
                following.append(other)
    if not reached:
        return None
    ends = [(connection, status) for connection, status in reached if not _behind(status, statuses)]
    stuck = [
        (connection, status)
        for connection, status in reached
        if status.idle_s >= still_s and all(other.idle_s < still_s for _, other in _behind(status, statuses))
    ]
    connection, longest = max(stuck or ends or reached, key=lambda end: end[1].idle_s)
    number = longest.exchanges[connection]
    ranks = {status.rank: status for status in statuses if status.exchanges.get(connection) == number}
    return Cause(tuple(ranks[rank] for rank in sorted(ranks)), connection, number + 1)


def last(statuses: Sequence[RankStatus]) -> list[RankStatus]:
    """Those that are ahead of none of the others."""
    return [status for status in statuses if not _behind(status, statuses)]


def _behind(status: RankStatus, statuses: Sequence[RankStatus]) -> list[tuple[str, RankStatus]]:
    """The ranks that have started the fewest exchanges of a connection, where that is fewer than `status` has."""
    found = []
    for connection, number in status.exchanges.items():
        others = [other for other in statuses if connection in other.exchanges]
        least = min((other.exchanges[connection] for other in others), default=number)
        found += [(connection, other) for other in others if other.exchanges[connection] == least < number]
    return found
