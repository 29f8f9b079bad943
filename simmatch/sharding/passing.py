"""Activities that pass from one stage of a stack to the next, with a number that tells the next stage whether to stop.

Every message is one tensor: activities [n, C, H, W], flat, and the stop flag behind them. Both sides know the number of
images of each message from the configuration. The sender goes on while at most `IN_FLIGHT` messages are on their way;
the receiver asks for the next message as soon as it has one, unless learning stops before that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from simmatch.sharding.exchange import Handle
from simmatch.sharding.mesh import Link

IN_FLIGHT = 4
"""Messages that a stage may be ahead of what the next one has asked for; more would only take memory."""


class Outlet:
    """The sending side.

    Parameters
    ----------
    link: to the stage above.

    >>> from types import SimpleNamespace
    >>> from simmatch.sharding.exchange import Done
    >>> sent = []
    >>> outlet = Outlet(SimpleNamespace(send=lambda message: sent.append(message) or Done()))
    >>> outlet.send(torch.ones(2, 3, 1, 1), stop=False)
    >>> outlet.flush()
    >>> sent
    [tensor([1., 1., 1., 1., 1., 1., 0.])]
    """

    def __init__(self, link: Link) -> None:
        self._link, self._pending = link, deque[Handle]()

    def send(self, activities: Tensor, *, stop: bool) -> None:
        """Start to send activities [n, C, H, W]; waits if too many messages are on their way."""
        message = torch.cat([activities.flatten(), activities.new_full((1,), float(stop))])
        self._pending.append(self._link.send(message))
        self._wait(IN_FLIGHT)

    def flush(self) -> None:
        """Wait until the stage above has taken all messages."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            self._pending.popleft().wait()


class Inlet:
    """The receiving side.

    Parameters
    ----------
    link: to the stage below.
    shape: (C, H, W) of the activities.
    messages: the update to which every message belongs, and its number of images.
    like: dtype and device of the activities.

    >>> from types import SimpleNamespace
    >>> from simmatch.sharding.exchange import Done
    >>> link = SimpleNamespace(receive=lambda message: message.zero_() is None or Done())
    >>> inlet = Inlet(link, (3, 1, 1), iter([(1, 2), (2, 5)]), like=torch.zeros(1))
    >>> activities, stop = inlet.receive()
    >>> activities.shape, stop
    (torch.Size([2, 3, 1, 1]), False)
    """

    def __init__(
        self, link: Link, shape: tuple[int, int, int], messages: Iterator[tuple[int, int]], *, like: Tensor
    ) -> None:
        self._link, self._shape, self._messages, self._like = link, shape, messages, like
        self._stop_after: int | None = None
        self._asked = self._ask()

    def receive(self) -> tuple[Tensor, bool]:
        """The next activities, and whether learning stops after their update."""
        assert self._asked is not None
        handle, message, update, count = self._asked
        handle.wait()
        stop = bool(message[-1])
        if stop:
            self._stop_after = update
        self._asked = self._ask()
        return message[:-1].view(count, *self._shape), stop

    def _ask(self) -> tuple[Handle, Tensor, int, int] | None:
        """Ask for the next message, if there is one."""
        following = next(self._messages, None)
        if following is None or (self._stop_after is not None and following[0] > self._stop_after):
            return None
        update, count = following
        channels, height, width = self._shape
        message = self._like.new_empty(count * channels * height * width + 1)
        return self._link.receive(message), message, update, count
