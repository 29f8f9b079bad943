"""A rank's profiles: each trace is written beside training, and its times are reported to the controller.

A disk that is full or gone, or a store that does not answer, costs a trace, not the run.
"""

from __future__ import annotations

import threading

from cluster.messages import LayerProfiled, Outbox
from cluster.storage import AnyPath, write_whole
from simmatch.profile import Recording

FOLDER = "profile"
"""Of the run directory."""


class TraceWriter:
    """Writes the traces of one rank, and reports each.

    Parameters
    ----------
    run_dir: the run's folder; rank: whose traces these are.
    patience_s: longest wait of `close`.
    """

    def __init__(self, run_dir: AnyPath, rank: int, report: Outbox, *, patience_s: float) -> None:
        self._folder, self._rank, self._report, self._patience_s = run_dir / FOLDER, rank, report, patience_s
        self._writing: list[threading.Thread] = []

    def submit(self, recording: Recording) -> None:
        """Write and report a recording; returns at once."""
        thread = threading.Thread(target=self._run, args=(recording,), name="traces", daemon=True)
        thread.start()
        self._writing.append(thread)

    def close(self) -> None:
        """Wait for what is being written, `patience_s` at most."""
        for thread in self._writing:
            thread.join(self._patience_s)
        self._writing = []

    def _run(self, recording: Recording) -> None:
        file, problem = "", recording.missing
        if recording.trace is not None:
            file = f"layer-{recording.layer}-rank-{self._rank}.json.gz"
            try:
                write_whole(self._folder / file, recording.trace.content)
            except OSError as error:
                file, problem = "", f"the trace is not written: {' '.join(str(error).split())}"
        trace = recording.trace
        self._report.send(
            LayerProfiled(
                layer=recording.layer,
                first=recording.first,
                updates=recording.updates,
                parts={} if trace is None else trace.parts,
                kernels=[] if trace is None else trace.kernels,
                file=file,
                problem=problem,
            )
        )
