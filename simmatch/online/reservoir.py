"""A bounded sample of the labelled inputs of a stream, balanced over classes and random within each.

Once all places are taken, a record of a class that has ever held most of them, alone or with others, takes the place of
one of its own class: the n-th of a class that holds m places with probability m / n. A record of any other class takes
the place of a random record of the class that holds most. So each record of a class is as likely to be held as any
other of it, rare classes are held whole, and the others share what is left. What is drawn is a function of the seed and
the number of the record alone.

Source: Chrysakis & Moens, "Online continual learning from imbalanced data" (2020), algorithm 1; within a class Vitter,
"Random sampling with a reservoir" (1985), algorithm R.
"""

from __future__ import annotations

from bisect import insort

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
    seed: of what is drawn.

    Attributes
    ----------
    inputs: [n, …], of the shape and dtype of the first record; None before it.
    labels: [n], int64.
    weights: [n], float64.
    numbers: [n], int64, the number of each record among all that were offered, from 0.
    seen: [classes], int64, number of records offered of each class.
    full: [classes], bool, whether a class has ever held most places.

    >>> reservoir = Reservoir(4)
    >>> reservoir.add(torch.arange(20.0).reshape(10, 2), torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 1]))
    >>> reservoir.inputs.shape, reservoir.labels.bincount().tolist(), reservoir.seen.tolist()
    (torch.Size([4, 2]), [3, 1], [9, 1])
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity = capacity
        self.inputs: Tensor | None = None
        self.labels = torch.zeros(0, dtype=torch.int64)
        self.weights = torch.zeros(0, dtype=torch.float64)
        self.numbers = torch.zeros(0, dtype=torch.int64)
        self.seen = torch.zeros(0, dtype=torch.int64)
        self.full = torch.zeros(0, dtype=torch.bool)
        self._key = stream("reservoir", seed)

    def add(self, inputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Offer records in order: inputs [n, …], labels [n], and weights [n] that are kept with them; None: 1 each."""
        if len(labels) == 0 or self.capacity == 0:
            return
        first = int(self.seen.sum())
        numbers = torch.arange(first, first + len(labels))
        places = self._places(labels.tolist(), uniform(folded(self._key, numbers)).tolist())
        if self.inputs is None:
            self.inputs = inputs.new_empty((0, *inputs.shape[1:]))
        if (room := max(places, default=-1) + 1 - len(self.labels)) > 0:
            self.inputs = torch.cat([self.inputs, inputs.new_empty((room, *inputs.shape[1:]))])
            self.labels, self.numbers = (pad(each, (0, room)) for each in (self.labels, self.numbers))
            self.weights = pad(self.weights, (0, room))
        where, rows = (torch.tensor(list(each), dtype=torch.int64) for each in (places, places.values()))
        self.inputs[where], self.labels[where], self.numbers[where] = inputs[rows], labels[rows], numbers[rows]
        self.weights[where] = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights[rows].double()

    def _places(self, labels: list[int], draws: list[float]) -> dict[int, int]:
        """Place → row of the last record that takes it, for records of these classes and numbers drawn in [0, 1)."""
        if (more := max(labels) + 1 - len(self.seen)) > 0:
            self.seen, self.full = pad(self.seen, (0, more)), pad(self.full, (0, more))
        seen, full = self.seen.tolist(), self.full.tolist()
        held: list[list[int]] = [[] for _ in seen]  # places of each class, ascending
        for place, label in enumerate(self.labels.tolist()):
            held[label].append(place)
        taken, count = {}, len(self.labels)
        for row, (label, draw) in enumerate(zip(labels, draws, strict=True)):
            seen[label] += 1
            if count < self.capacity:
                place, count = count, count + 1
            else:
                largest = max(range(len(held)), key=lambda each: len(held[each]))
                full = [one or len(own) == len(held[largest]) for one, own in zip(full, held, strict=True)]
                source = label if full[label] else largest
                chosen = int(draw * (seen[label] if full[label] else len(held[largest])))
                if chosen >= len(held[source]):
                    continue
                place = held[source].pop(chosen)
            insort(held[label], place)
            taken[place] = row
        self.seen, self.full = torch.tensor(seen), torch.tensor(full)
        return taken

    @property
    def ages(self) -> Tensor:
        """[n], the number of records after each."""
        return self.seen.sum() - 1 - self.numbers

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(value.nbytes for value in self._tensors().values())

    def state(self) -> State:
        """Everything that changes, in tensors of its own."""
        return {name: value.clone() for name, value in self._tensors().items()}

    def _tensors(self) -> State:
        names = ("labels", "weights", "numbers", "seen", "full")
        tensors: State = {name: getattr(self, name) for name in names}
        return tensors if self.inputs is None else tensors | {"inputs": self.inputs}

    def restore(self, state: State) -> None:
        """Set what `state` gave."""
        self.labels, self.weights, self.numbers = (state[name].clone() for name in ("labels", "weights", "numbers"))
        self.seen, self.full = state["seen"].clone(), state["full"].clone()
        self.inputs = state["inputs"].clone() if "inputs" in state else None
