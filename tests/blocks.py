"""Block steps driven over any exchange, two tiles in turn, without the layer around them."""

from __future__ import annotations

import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.rows import Rows, join_rows, split_rows
from simmatch.solvers.block import Blocks, BlockTile, iterate_block
from simmatch.solvers.bound import certify_afresh
from simmatch.solvers.dynamics import exchange_then_run
from simmatch.solvers.tile import Steps
from tests.exchanges import held


def steps_of(
    tile: BlockTile, blocks: Blocks, config: DynamicsConfig, exchange: Exchange, fault: Exception | None = None
) -> Steps:
    """All exchanges of a started tile, the first one included."""
    return exchange_then_run(tile, iterate_block(tile, blocks, config, exchange), exchange, held(fault, exchange))


def solve_blocks(
    exchange: Exchange,
    drive: Tensor,
    lateral: Tensor,
    config: DynamicsConfig,
    fault: Exception | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """y [K, N], residual [N] and the block steps of the slowest tile; drive [K, N] and lateral [K, K] of all owners."""
    rows = split_rows(lateral.shape[0], exchange.world_size)[exchange.rank]
    own_drive, own_lateral = drive[rows.start : rows.stop], lateral[rows.start : rows.stop]
    bound = certify_afresh(lateral.nan_to_num(), Rows.all(lateral.shape[0]), ridge=config.ridge)
    blocks = Blocks.from_lateral(own_lateral, bound, config, rows, exchange.world_size)
    y, residual = torch.empty_like(drive), drive.new_empty(drive.shape[1])
    width = config.columns_per_tile(rows.total)
    waiting = [slice(start, min(start + width, drive.shape[1])) for start in range(0, drive.shape[1], width)]
    steps, running = 0, []
    while waiting or running:
        while waiting and len(running) < config.tiles_in_flight:
            where = waiting.pop(0)
            tile = BlockTile(rows, where.stop - where.start, exchange, own_drive, config)
            own = None if start is None else start[rows.start : rows.stop, where]
            tile.start(own_drive[:, where], blocks, own)
            generator = steps_of(tile, blocks, config, exchange, fault)
            running.append((where, tile, generator, next(generator)))
        where, tile, generator, handle = running.pop(0)
        handle.wait()
        try:
            running.append((where, tile, generator, next(generator)))
        except StopIteration as stop:
            y[:, where] = join_rows(tile.gathered, rows.total)
            residual[where] = stop.value[1]
            steps = max(steps, stop.value[0])
    return y, residual, steps
