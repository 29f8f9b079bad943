"""Benchmarks of the dynamics, of sharding, of checkpoints and tracking: `python -m jobs.benchmark NAME`.

Rows go to standard output and to `<run-dir>/<subcommand>.jsonl`, one JSON object per line; tables and progress go to
standard error; figures into `<run-dir>/figures`.

Exit status: 0 finished; 2 bad input, or a requirement is missing (one line); 130, 143 or 129: interrupted by Ctrl-C,
SIGTERM or a closed terminal.
"""

from __future__ import annotations

import argparse
import sys

import torch
from threadpoolctl import threadpool_limits

from cluster.redaction import one_line
from jobs.benchmarks import dynamics, exact, gpu, ingest, network, overhead, pynsm, scaling, windows
from jobs.benchmarks.stream import command as stream
from jobs.benchmarks.timing import MIN_ROUNDS
from jobs.entry_point import BAD_INPUT, run_main
from jobs.options import at_least
from jobs.reporting import MissingError, Report
from jobs.run_directory import default_root, local_folder
from jobs.signals import SignalHandler
from simmatch.config import ConfigError
from simmatch.data.formats import DataError

SUBCOMMANDS = {
    "dynamics": (dynamics, "the solvers on one device: iterations, columns/s, share of the GEMM rate, memory"),
    "exact": (exact, "one result at any layout of ranks: digests of the same job, and the price of an update"),
    "gpu": (gpu, "the dynamics, updates and encoding on a CUDA device, compared with plain torch"),
    "ingest": (ingest, "reading an epoch of prepared images: speed and memory, compared with other ways to read"),
    "pynsm": (pynsm, "encoding and training compared with the authors' library"),
    "scaling": (scaling, "shards compared with one device, for every exchange mode; with --axes, replicas and stages"),
    "signals": (windows, "1-D layers on signals: accuracy beside random filters and the spectrum, windows per second"),
    "stream": (stream, "data that never ends: test, then learn, beside rivals; late and few labels, forgetting"),
    "network": (network, "exchange modes and number formats between two hosts on a slow link"),
    "overhead": (overhead, "share of training time spent on checkpoints and tracking"),
}
"""Name → module with `add_arguments(parser)` and `run(options, report)`, and its purpose."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, run. Returns the exit status."""
    options = _parser().parse_args(arguments)
    before, signals = torch.get_num_threads(), SignalHandler()
    try:
        torch.set_num_threads(options.threads or before)
        run_dir = local_folder("--run-dir", options.run_dir, default_root() / f"benchmark-{options.subcommand}")
        with signals, threadpool_limits(limits=torch.get_num_threads()), Report(options.subcommand, run_dir) as report:
            report.environment(vars(options))
            SUBCOMMANDS[options.subcommand][0].run(options, report)
    except (ConfigError, DataError, MissingError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; the rows so far are kept", file=sys.stderr)
        return signals.status
    finally:
        torch.set_num_threads(before)
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="small sizes: about a minute on two cores")
    common.add_argument("--run-dir", metavar="DIR", help="folder for rows and figures (default: runs/benchmark-NAME)")
    common.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="seed of data order and weights (default: 0)"
    )
    common.add_argument(
        "--threads", type=at_least(1), metavar="N", help="threads of torch and BLAS (default: as many as torch takes)"
    )
    common.add_argument(
        "--rounds",
        type=at_least(MIN_ROUNDS),
        default=MIN_ROUNDS,
        metavar="N",
        help=f"rounds, in each of which every candidate is timed once; at least {MIN_ROUNDS} (default: {MIN_ROUNDS})",
    )
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark", description=(__doc__ or "").splitlines()[0])
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="NAME")
    for name, (module, purpose) in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, parents=[common], help=purpose, description=purpose)
        module.add_arguments(subparser)
    return parser


if __name__ == "__main__":
    run_main(main)
