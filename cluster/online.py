"""A stack that learns from a stream on several ranks, behind the interface of `simmatch.online.stack.OnlineStack`.

The driver holds the stream; Ray actors hold the stack (`cluster.online_rank`). A batch is sent to rank 0, and what is
needed of it comes back from there. All ranks get the same calls in the same order, so nothing else is agreed on.

A rank that is lost replaces the whole group, as in training: the new one starts from the newest state that the driver
has, and is called again as the old one was since then, to the same bits. So the driver keeps the batches since the
newest state, which it takes every `STATE_EVERY` updates if nobody else has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor

from cluster.config import GroupConfig, RunConfig
from cluster.group import WorkerGroup
from cluster.mesh import MeshConfig
from cluster.online_rank import Arrays, OnlineRank, Reply, StreamAssignment
from cluster.policy import FailurePolicy, GroupFailure, RanksLostError, Stop
from simmatch.config import ConfigError, ModelConfig, Reduce
from simmatch.data.config import DataConfig
from simmatch.model import InputConfig, Stack
from simmatch.online.rate import RateConfig
from simmatch.online.stack import Encoded, OnlineStack
from simmatch.online.state import State

STATE_EVERY = 200
"""Updates between two states that the driver takes."""

PART_OF_HEARTBEAT = 0.25
"""Pause between two signs of life of a driver that has nothing to do, over the heartbeat."""


@dataclass(frozen=True)
class Call:
    """One call of all ranks."""

    name: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)


class StreamGroup(WorkerGroup):
    """The ranks of one generation, which are called for every batch."""

    def _write_nonce(self) -> str:
        return ""

    def _check_run_dir(self, nonce: str) -> None:
        """Ranks of a stream write nothing."""

    def perform(self, call: Call) -> Reply:
        """Call all ranks; the answer of rank 0.

        Raises
        ------
        GroupFailure
            A rank died, raised an exception, or did not answer within `stall_timeout_s`.
        """
        header = [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in call.tensors.items()
        ]
        arrays: Arrays = {name: tensor.detach().cpu().numpy() for name, tensor in call.tensors.items()}
        refs = [
            actor.perform.remote(call.name, dict(call.options), header, arrays if rank == 0 else None)
            for rank, actor in enumerate(self._actors)
        ]
        reply: Reply = self._gather(refs, call.name, limit_s=self.config.stall_timeout_s)[0]
        return reply


class RankedStack:
    """A stack on several ranks. Methods and attributes are those of `OnlineStack`, but for the layers themselves.

    Parameters
    ----------
    model, source, seed, rate, reduce, dtype: as for `OnlineStack`.
    mesh: replicas and shards; stages of a stream are not supported.
    cluster: the actors, their waits and their network; `threads_per_rank` is 1 unless it is set.
    device: `cpu` or `cuda`.
    note: told what is waited for, and why ranks are replaced.
    grows: as for `WorkerGroup`.

    Attributes
    ----------
    generation: groups so far that have been replaced.
    """

    def __init__(
        self,
        model: ModelConfig,
        source: InputConfig,
        *,
        mesh: MeshConfig,
        cluster: GroupConfig | None = None,
        seed: int = 0,
        rate: RateConfig | None = None,
        reduce: Reduce = "fast",
        dtype: str = "float32",
        device: str = "cpu",
        note: Callable[[str], None] = lambda _: None,
        grows: bool = True,
    ) -> None:
        if mesh.layer > 1:
            raise ConfigError(f"mesh.layer: expected 1 for a stream, got {mesh.layer}")
        limits = cluster or GroupConfig()
        if limits.threads_per_rank is None:
            limits = limits.model_copy(update={"threads_per_rank": 1})
        self._config = RunConfig.model_validate(
            {
                "name": "stream",
                "data": DataConfig(name="stream"),
                "model": model,
                "mesh": mesh,
                "cluster": limits,
                "seed": seed,
                "reduce": reduce,
                "dtype": dtype,
                "device": device,
            }
        )
        self._config.check_mesh()
        self.rate, self.source, self.generation = rate or RateConfig(), source, 0
        self._local().state()  # what cannot be built is refused here
        self._first_source, self._note, self._grows = source, note, grows
        self._policy = FailurePolicy(limits.max_restarts, limits.max_preemptions, limits.min_shards, limits.backoff_s)
        self._in_a_row, self._number = 0, 0
        self._group: StreamGroup | None = None
        self._state: State | None = None
        self._since: list[Call] = []
        self._encoded: int | None = None
        self._reply = Reply({}, updates=0, learning_rate=self._local().learning_rate, calibrated=False)
        self._turn, self._closed = threading.RLock(), threading.Event()
        self._keeper = threading.Thread(target=self._keep_alive, name="ranks of a stream", daemon=True)
        self._keeper.start()

    def _local(self) -> OnlineStack:
        """The same stack in this process, before it has learnt anything."""
        config = self._config
        options: dict[str, Any] = {"reduce": config.reduce, "dtype": getattr(torch, config.dtype)}
        return OnlineStack(config.model, self.source, seed=config.seed, rate=self.rate, **options)

    # ------------------------------------------------------------------------------------------- ranks

    def _start(self) -> StreamGroup:
        """A new group that has been called as the one before it."""
        assignment = StreamAssignment(
            self._config,
            Path(),
            0,
            generation=self.generation,
            token=token_hex(4),
            source=self._first_source,
            rate=self.rate,
        )
        self._group = group = StreamGroup(assignment, OnlineRank, grows=self._grows)
        group.start(self._note)
        self._encoded = None
        if self._state is not None:
            self._reply = group.perform(Call("restore", self._state))
        for call in self._since:
            self._reply = group.perform(call)
        return group

    def _call(self, call: Call, *, changes: bool = True, again: Call | None = None) -> Reply:
        """Call all ranks, of as many groups as the policy allows.

        changes: whether the stack changes, so that a new group has to be called likewise.
        again: the call for a new group, where it differs.
        """
        with self._turn:
            while True:
                try:
                    fresh = self._group is None
                    group = self._group or self._start()
                    self._reply = group.perform(again if again is not None and fresh else call)
                    break
                except GroupFailure as error:
                    self._after(error)
            if changes:
                self._since.append(again or call)
            return self._reply

    def _after(self, error: GroupFailure) -> None:
        """End the group; make way for another, or raise."""
        self._end()
        failure, shards = error.failure, self._config.mesh.channel
        decision = self._policy.decide(failure, self._in_a_row, shards)
        if isinstance(decision, Stop):
            raise RanksLostError(decision.why) from error
        self._in_a_row += 1
        self.generation += 1
        if decision.shards != shards:
            mesh = self._config.mesh.model_copy(update={"channel": decision.shards})
            self._config = self._config.model_copy(update={"mesh": mesh})
        calls = f"{len(self._since)} call{'' if len(self._since) == 1 else 's'}"
        self._note(f"{failure.message}; starting new ranks from the newest state, {calls} to repeat")
        time.sleep(decision.after_s)

    def _end(self) -> None:
        group, self._group, self._encoded = self._group, None, None
        if group is not None:
            group.end()

    def _keep_alive(self) -> None:
        """A sign of life now and then: ranks end themselves where their driver does not call."""
        while not self._closed.wait(PART_OF_HEARTBEAT * self._config.cluster.heartbeat_s):
            with self._turn:
                if self._group is not None and not self._closed.is_set():
                    with suppress(GroupFailure):  # the next call finds out
                        self._group.poll()

    def close(self) -> None:
        """End the ranks."""
        self._closed.set()
        with self._turn:
            self._end()

    # ------------------------------------------------------------------------------------------- as an OnlineStack

    @property
    def calibrated(self) -> bool:
        return self._reply.calibrated

    @property
    def updates(self) -> int:
        return self._reply.updates

    @property
    def learning_rate(self) -> float:
        return self._reply.learning_rate

    def calibrate(self, x: Tensor) -> None:
        if self.calibrated:
            raise RuntimeError("calibrate: expected one call, got another; what is measured first stays")
        self._call(Call("calibrate", {"x": x}))

    def encode(self, x: Tensor) -> Encoded:
        if not self.calibrated:
            raise RuntimeError("encode: expected a calibrated stack; call calibrate() with the first records")
        with self._turn:
            self._number += 1
            reply = self._call(Call("encode", {"x": x}, {"number": self._number}), changes=False)
            self._encoded = self._number
        found = {name: torch.from_numpy(array.copy()) for name, array in reply.tensors.items()}
        signals = {name.removeprefix("signals."): each for name, each in found.items() if name.startswith("signals.")}
        return Encoded(
            x=x,
            features=found["features"],
            signals=signals,
            label_scores=found.get("scores"),
            activity=found["activity"],
            solved={},
            version=self._number,
        )

    def learn(self, encoded: Encoded, labels: Tensor | None = None, weights: Tensor | None = None) -> None:
        given = {"labels": labels, "weights": weights}
        self._learn_from(encoded, "learn", {name: each for name, each in given.items() if each is not None})
        if sum(call.name == "learn" for call in self._since) >= STATE_EVERY:
            self.state()

    def learn_labels(self, encoded: Encoded, labels: Tensor) -> None:
        if any(layer.supervised for layer in self._config.model.layers):
            self._learn_from(encoded, "learn_labels", {"labels": labels})

    def _learn_from(self, encoded: Encoded, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Records are sent again only where the ranks have encoded others since, or are new."""
        number = {"number": encoded.version}
        whole = Call(name, {"x": encoded.x, **tensors}, number)
        with self._turn:
            here = self._group is not None and self._encoded == encoded.version
            self._call(Call(name, tensors, number) if here else whole, again=whole)
            self._encoded = None

    def raise_rate(self) -> None:
        self._call(Call("raise_rate"))

    def grow(self, num_classes: int) -> None:
        before = self.source.num_classes
        if num_classes < before:
            raise ValueError(f"num_classes: expected at least {before}, the classes so far, got {num_classes}")
        self._call(Call("grow", options={"num_classes": num_classes}))
        self.source = self.source.model_copy(update={"num_classes": num_classes})

    def state(self) -> State:
        with self._turn:
            reply = self._call(Call("state"), changes=False)
            state = {name: torch.from_numpy(array.copy()) for name, array in reply.tensors.items()}
            self._state, self._since, self._in_a_row = state, [], 0
        return dict(state)

    def restore(self, state: State) -> None:
        local = self._local()
        local.restore(state)  # refuses that of another model
        with self._turn:
            self._state, self._since, self._encoded, self.source = dict(state), [], None, local.source
            if self._group is None:
                self._reply = Reply({}, local.updates, local.learning_rate, local.calibrated)
            else:
                self._call(Call("restore", state), changes=False)

    def export(self) -> Stack:
        local = self._local()
        local.restore(self.state())
        return local.export()
