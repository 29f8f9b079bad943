"""A bounded sample of all labelled inputs of a stream, each as likely to be in it as any other.

Record n takes a place at random with probability capacity / n, and what was there is dropped. Its place is a function
of the seed and n alone.

Source: Vitter, "Random sampling with a reservoir" (1985), algorithm R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simmatch.online.state import State
from simmatch.seeding import folded, stream, uniform


class Reservoir:
    """At most `capacity` inputs with their labels.

    Parameters
    ----------
    capacity: greatest number of records held.
    seed: of the places.

    Attributes
    ----------
    inputs: [n, …], of the shape and dtype of the first record; None before it.
    labels: [n], int64.
    seen: number of records so far.

    >>> reservoir = Reservoir(3)
    >>> reservoir.add(torch.arange(20.0).reshape(10, 2), torch.arange(10))
    >>> reservoir.inputs.shape, len(reservoir.labels), reservoir.seen
    (torch.Size([3, 2]), 3, 10)
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity = capacity
        self.inputs: Tensor | None = None
        self.labels = torch.zeros(0, dtype=torch.int64)
        self.seen = 0
        self._key = stream("reservoir", seed)

    def add(self, inputs: Tensor, labels: Tensor) -> None:
        """Offer records, inputs [n, …] and labels [n], in order."""
        numbers = torch.arange(self.seen, self.seen + len(labels))
        places = (uniform(folded(self._key, numbers)) * (numbers + 1)).long()
        places = torch.where(numbers < self.capacity, numbers, places)
        self.seen += len(labels)
        last = {int(place): row for row, place in enumerate(places) if place < self.capacity}
        if not last:
            return
        if self.inputs is None:
            self.inputs = inputs.new_empty((0, *inputs.shape[1:]))
        room = min(self.seen, self.capacity) - len(self.labels)
        self.inputs = torch.cat([self.inputs, inputs.new_empty((room, *inputs.shape[1:]))]) if room else self.inputs
        self.labels = torch.cat([self.labels, labels.new_empty(room)]) if room else self.labels
        rows, where = torch.tensor(list(last.values())), torch.tensor(list(last))
        self.inputs[where] = inputs[rows]
        self.labels[where] = labels[rows]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.labels.nbytes + (0 if self.inputs is None else self.inputs.nbytes)

    def state(self) -> State:
        """Everything that changes, in tensors of its own."""
        state = {"labels": self.labels.clone(), "seen": torch.tensor(self.seen)}
        return state if self.inputs is None else state | {"inputs": self.inputs.clone()}

    def restore(self, state: State) -> None:
        """Set what `state` gave."""
        self.labels, self.seen = state["labels"].clone(), int(state["seen"])
        self.inputs = state["inputs"].clone() if "inputs" in state else None
