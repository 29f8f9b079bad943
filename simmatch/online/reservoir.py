"""A bounded sample of all labelled inputs of a stream, each as likely to be in it as any other.

Record n takes a place at random with probability capacity / n, and what was there is dropped. Its place is a function
of the seed and n alone.

Source: Vitter, "Random sampling with a reservoir" (1985), algorithm R.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    weights: [n], float64.
    numbers: [n], int64, the number of each record among all that were offered, from 0.
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
        self.weights = torch.zeros(0, dtype=torch.float64)
        self.numbers = torch.zeros(0, dtype=torch.int64)
        self.seen = 0
        self._key = stream("reservoir", seed)

    def add(self, inputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Offer records in order: inputs [n, …], labels [n], and weights [n] that are kept with them; None: 1 each."""
        numbers = torch.arange(self.seen, self.seen + len(labels))
        places = (uniform(folded(self._key, numbers)) * (numbers + 1)).long()
        places = torch.where(numbers < self.capacity, numbers, places)
        self.seen += len(labels)
        last = {int(place): row for row, place in enumerate(places) if place < self.capacity}
        if not last:
            return
        if self.inputs is None:
            self.inputs = inputs.new_empty((0, *inputs.shape[1:]))
        if room := min(self.seen, self.capacity) - len(self.labels):
            self.inputs = torch.cat([self.inputs, inputs.new_empty((room, *inputs.shape[1:]))])
            self.labels, self.numbers = (pad(each, (0, room)) for each in (self.labels, self.numbers))
            self.weights = pad(self.weights, (0, room))
        rows, where = torch.tensor(list(last.values())), torch.tensor(list(last))
        self.inputs[where], self.labels[where], self.numbers[where] = inputs[rows], labels[rows], numbers[rows]
        self.weights[where] = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights[rows].double()

    @property
    def ages(self) -> Tensor:
        """[n], the number of records after each."""
        return self.seen - 1 - self.numbers

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(value.nbytes for value in self._tensors().values())

    def state(self) -> State:
        """Everything that changes, in tensors of its own."""
        return {name: value.clone() for name, value in self._tensors().items()}

    def _tensors(self) -> State:
        tensors = {"labels": self.labels, "weights": self.weights, "numbers": self.numbers}
        tensors |= {} if self.inputs is None else {"inputs": self.inputs}
        return tensors | {"seen": torch.tensor(self.seen)}

    def restore(self, state: State) -> None:
        """Set what `state` gave."""
        self.labels, self.weights, self.numbers = (state[name].clone() for name in ("labels", "weights", "numbers"))
        self.inputs, self.seen = state["inputs"].clone() if "inputs" in state else None, int(state["seen"])
