"""Windows per second of a stream on one thread: each batch is encoded, scored and learnt from, and the readout learns;
and what each part costs, see `costs`.

The layer of `jobs.benchmark signals`: one channel, windows of 256 samples, 64 filters of 32 at stride 8, all positions;
batches of 64. All windows are labelled.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor

from jobs.benchmarks.stream import costs
from jobs.benchmarks.stream.rows import SimilarityMatching, WithReadout
from jobs.benchmarks.stream.streams import Part, Stream
from jobs.benchmarks.timing import Spread
from jobs.benchmarks.windows import BATCH, CHANNELS, KERNEL, STRIDE, TARGET, UPDATES
from jobs.reporting import Report
from simmatch.config import ModelConfig, parse
from simmatch.online.rate import RateConfig
from simmatch.online.readout import ReadoutConfig

MODEL = parse(
    ModelConfig,
    {
        "layers": [
            {
                "out_channels": CHANNELS, "kernel_size": [1, KERNEL], "stride": [1, STRIDE], "pool": [1, 1],
                "power": 0.5, "dynamics": {"exchange": "gather_state"},
            }
        ]
    },
)  # fmt: skip


def measure(stream: Stream, rounds: int, quick: bool, report: Report) -> None:
    """Processor time of a record in `rounds` rounds of `UPDATES` batches, after a first round that is not counted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    row = WithReadout(SimilarityMatching(stream, MODEL, 0, RateConfig(kind="falling")), ReadoutConfig())
    whole = Part("", torch.cat([part.read(slice(None)) for part in stream.segments]), _labels(stream))
    batches = [batch for batch in whole.batches(BATCH) if len(batch[1]) == BATCH]
    seconds: list[list[float]] = []
    for first in range(0, (rounds + 1) * UPDATES, UPDATES):
        seconds.append([])
        for number in range(first, first + UPDATES):
            x, labels = batches[number % len(batches)]
            begun = time.process_time()
            row.predict(x)
            row.learn(x, labels)
            seconds[-1].append(time.process_time() - begun)
    rate = Spread.of([BATCH / median(each) for each in seconds[1:]])
    report.row(kind="speed", **rate.fields("windows_per_second"), target=TARGET, state_bytes=row.nbytes)
    cells = [round(rate.median), f"{rate.min:,.0f}–{rate.max:,.0f}", TARGET, row.nbytes]
    report.table("test, then learn, on one thread", ["windows / s", "rounds", "target", "bytes of state"], [cells])
    costs.measure(whole.read(slice(None)), MODEL, rounds, quick, report)
    torch.set_num_threads(threads)


def _labels(stream: Stream) -> Tensor:
    return torch.cat([part.labels for part in stream.segments])
