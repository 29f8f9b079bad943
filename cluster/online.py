"""A stack that learns from a stream on several ranks, behind the interface of `simmatch.online.stack.OnlineStack`.

The driver holds the stream; Ray actors hold the stack (`cluster.online_rank`). A batch is sent to rank 0, and what is
needed of it comes back from there. All ranks get the same calls in the same order, so nothing else is agreed on.

A rank that is lost replaces the whole group, as in training: the new one starts from the newest state that the driver
has, and is called again as the old one was since then, to the same bits. So the driver keeps the calls since the
newest state, which it takes after `STATE_EVERY` of them if nobody else has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor

from cluster.config import GroupConfig, RunConfig
from cluster.failures import classify
from cluster.mesh import MeshConfig
from cluster.online_group import Call, StreamGroup
from cluster.online_rank import OnlineRank, Reply, StreamAssignment
from cluster.policy import GroupFailure, RanksLostError, Stop
from cluster.succession import Succession
from cluster.summary import RunRecord
from cluster.text import count
from simmatch.arguments import check_classes
from simmatch.config import ModelConfig, Reduce
from simmatch.data.config import DataConfig
from simmatch.model import InputConfig, Stack
from simmatch.online.arguments import check_calibrated, check_records, check_uncalibrated, learnable, learnable_labels
from simmatch.online.encoded import Encoded
from simmatch.online.rate import RateConfig
from simmatch.online.stack import OnlineStack
from simmatch.online.state import State

STATE_EVERY = 200
"""Calls that change the stack between two states that the driver takes."""

PART_OF_HEARTBEAT = 0.25
"""Pause between two signs of life of a driver that has nothing to do, over the heartbeat."""


class RankedStack:
    """A stack on several ranks. Methods and attributes are those of `OnlineStack`, but for the layers themselves.

    A call during which ranks are lost for good, or that is interrupted, ends it: all later calls but `close` raise
    `RanksLostError`, and the newest state, with what was learnt since, is where another one goes on.

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
    seconds: of processor time of all ranks so far, for calls.
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
        mesh.check_stream()
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
        self.rate, self.source, self.seconds = rate or RateConfig(), source, 0.0
        local = self._local()
        local.state()  # what cannot be built is refused here
        self._first_source, self._note, self._grows = source, note, grows
        self._succession = Succession(self._config, RunRecord())
        self._number = 0
        self._group: StreamGroup | None = None
        self._failure: GroupFailure | None = None
        self._over = ""
        self._state: State | None = None
        self._since: list[Call] = []
        self._encoded: int | None = None
        self._reply = Reply({}, local.updates, local.learning_rate, calibrated=False)
        self._turn, self._closed = threading.RLock(), threading.Event()
        self._keeper = threading.Thread(target=self._keep_alive, name="ranks of a stream", daemon=True)
        self._keeper.start()

    def _local(self) -> OnlineStack:
        """The same stack in this process, before it has learnt anything."""
        config = self._config
        options: dict[str, Any] = {"reduce": config.reduce, "dtype": getattr(torch, config.dtype)}
        return OnlineStack(config.model, self.source, seed=config.seed, rate=self.rate, **options)

    # ------------------------------------------------------------------------------------------- ranks

    @property
    def generation(self) -> int:
        return self._succession.generation

    def _start(self) -> None:
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
        self._group = StreamGroup(assignment, OnlineRank, grows=self._grows)
        self._group.start(self._note)
        calls = [] if self._state is None else [Call("restore", self._state)]
        for call in (*calls, *self._since):
            self._perform(self._group, call)

    def _perform(self, group: StreamGroup, call: Call) -> Reply:
        if self._failure is not None:  # as a sign of life has found
            raise self._failure
        reply = group.perform(call)
        self._reply = replace(reply, tensors={})  # they may be a whole state, in Ray's memory as long as they are kept
        self.seconds += reply.seconds
        return reply

    def _call(self, call: Call, *, changes: bool = True, again: Call | None = None) -> Reply:
        """Call all ranks, of as many groups as the policy allows.

        changes: whether the stack changes, so that a new group has to be called likewise.
        again: the call for a new group, where it differs.
        """
        with self._turn:
            if self._over:
                raise RanksLostError(self._over)
            try:
                reply = self._called(call, again or call)
                if changes:
                    kept = again or call  # with tensors of its own: the caller may use the memory again
                    self._since.append(replace(kept, tensors={key: one.clone() for key, one in kept.tensors.items()}))
            except BaseException as error:  # the ranks may have done what this process does not know of
                self._over = str(error) or type(error).__name__
                self._end()
                raise
            if changes and len(self._since) >= STATE_EVERY:
                self.state()
            return reply

    def _called(self, call: Call, again: Call) -> Reply:
        while True:
            try:
                if self._group is not None:
                    return self._perform(self._group, call)
                self._start()
                call = again
            except GroupFailure as error:
                self._after(error)

    def _after(self, error: GroupFailure) -> None:
        """End the group; make way for another, or raise."""
        self._end()
        failure, ranks = error.failure, self._config.mesh.world_size
        decision = self._succession.after(failure, ranks, room=0)
        if isinstance(decision, Stop):
            raise RanksLostError(decision.why) from error
        self._succession.count(decision, failure, ranks)
        if decision.shards != ranks:
            mesh = self._config.mesh.model_copy(update={"channel": decision.shards})
            self._config = self._config.model_copy(update={"mesh": mesh})
        origin = "the beginning" if self._state is None else "the newest state"
        calls = count(len(self._since), "call")
        self._note(f"{failure.message}; starting {count(decision.shards, 'new rank')} from {origin}, {calls} to repeat")
        time.sleep(decision.after_s)

    def _end(self) -> None:
        group, self._group, self._encoded, self._failure = self._group, None, None, None
        if group is not None:
            group.end()

    def _keep_alive(self) -> None:
        """A sign of life now and then: ranks end themselves where their driver does not call."""
        while not self._closed.wait(PART_OF_HEARTBEAT * self._config.cluster.heartbeat_s):
            with self._turn:
                if self._group is None or self._failure is not None:
                    continue
                try:
                    self._group.poll()
                except GroupFailure as error:
                    self._failure = error  # for the next call
                except Exception as error:  # such as of a Ray that was left
                    self._failure = GroupFailure(classify(error))

    def close(self) -> None:
        """End the ranks."""
        self._closed.set()
        with self._turn:
            self._over = self._over or "the stack was closed"
            self._end()
        self._keeper.join()

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
        check_uncalibrated(self.calibrated)
        check_records(x, self.source)
        self._call(Call("calibrate", {"x": x}))

    def encode(self, x: Tensor) -> Encoded:
        check_calibrated(self.calibrated)
        check_records(x, self.source)
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
        known = learnable(self._config.model, self.source, len(encoded.x), labels, weights)
        if known is not None:
            given = dict(zip(("labels", "weights"), known, strict=True))
            self._learn_from(encoded, "learn", {name: each for name, each in given.items() if each is not None})

    def learn_labels(self, encoded: Encoded, labels: Tensor) -> None:
        known = learnable_labels(self._config.model, self.source, len(encoded.x), labels)
        if known is not None:
            self._learn_from(encoded, "learn_labels", {"labels": known})

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
        check_classes(num_classes, self.source.num_classes)
        self._call(Call("grow", options={"num_classes": num_classes}))
        self.source = self.source.model_copy(update={"num_classes": num_classes})

    def state(self) -> State:
        with self._turn:
            if self._state is None or self._since:
                reply = self._call(Call("state"), changes=False)
                self._state = {name: torch.from_numpy(array.copy()) for name, array in reply.tensors.items()}
                self._since = []
                self._succession.saved()
            return {name: tensor.clone() for name, tensor in self._state.items()}

    def restore(self, state: State) -> None:
        local = self._local()
        local.restore(state)  # refuses that of another model
        with self._turn:
            self._since, self._encoded, self.source = [], None, local.source
            self._state = {name: tensor.clone() for name, tensor in state.items()}
            if self._group is None:
                self._reply = Reply({}, local.updates, local.learning_rate, local.calibrated)
            else:
                self._call(Call("restore", state), changes=False)

    def export(self) -> Stack:
        local = self._local()
        local.restore(self.state())
        return local.export()
