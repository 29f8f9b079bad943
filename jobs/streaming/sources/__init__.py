"""Sources of a stream: a file that grows, a folder that files arrive in, a broker of MQTT."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from pydantic import model_validator

from jobs.streaming.records import Position, Source
from jobs.streaming.sources.broker import BrokerConfig, BrokerSource
from jobs.streaming.sources.folder import FolderConfig, FolderSource
from jobs.streaming.sources.lines import LinesConfig, LinesSource
from simmatch.config import Frozen

LOG = logging.getLogger(__name__)


class SourceConfig(Frozen):
    """Where records come from: exactly one of these.

    >>> SourceConfig(lines=LinesConfig(path="log.jsonl")).kind
    'lines'
    """

    lines: LinesConfig | None = None
    """A file that grows, of JSON or CSV."""

    folder: FolderConfig | None = None
    """A folder that files arrive in: recordings, images, lines of JSON."""

    mqtt: BrokerConfig | None = None
    """Topics of an MQTT broker, of messages in JSON."""

    @model_validator(mode="after")
    def _one(self) -> SourceConfig:
        kinds = list(type(self).model_fields)
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(kinds)}, got {' and '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """The name of the one that is given."""
        return next(kind for kind in type(self).model_fields if getattr(self, kind) is not None)


def open_source(
    config: SourceConfig,
    positions: Mapping[str, Position],
    tell: Callable[[str], None] = LOG.warning,
    *,
    period_s: float | None = None,
) -> Source:
    """The source of a configuration, from where reading had been.

    Parameters
    ----------
    positions: the last acknowledged position of each key, `position["source"]`.
    tell: is given one line for people wherever something is waited for, or is not as expected: once each.
    period_s: from sample to sample, of recordings without times.

    Raises
    ------
    ConfigError
        It can never be read as configured.

    >>> source = open_source(SourceConfig(lines=LinesConfig(path="/nowhere/log.jsonl")), {})
    >>> source.poll(limit=10, wait_s=0), source.ended
    ([], False)
    """
    if config.mqtt is not None:
        return BrokerSource(config.mqtt, tell)
    if config.folder is not None:
        return FolderSource(config.folder, positions, tell, period_s)
    assert config.lines is not None
    return LinesSource(config.lines, positions, tell)
