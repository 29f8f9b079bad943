"""Parquet files that hold the bytes of image files and integer labels, as those of the Hugging Face hub do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.data.places import Files, matching, message
from simmatch.data.samples import Names, Sample, Samples
from simmatch.documents import shortened
from simmatch.extras import extra
from simmatch.labels import UNLABELLED


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files with a column of images.

    >>> ParquetFiles(("/data/a.parquet",), "image").name(Sample("a.parquet/0000000007", (0, 0, 7), 0))
    '/data/a.parquet: row 7'
    """

    files: tuple[str, ...]
    column: str

    def name(self, sample: Sample) -> str:
        """The file and row of an image."""
        return f"{self.files[sample.location[0]]}: row {int(sample.key.rpartition('/')[2])}"

    def files_of(self, keys: Names) -> tuple[str, ...]:
        """All of the files."""
        return self.files

    @contextmanager
    def open(self) -> Iterator[Callable[[Sample], bytes]]:
        """A reader of the images, which holds one row group."""
        with Files() as files:
            held: tuple[tuple[int, int], Any] | None = None

            def read(sample: Sample) -> bytes:
                nonlocal held
                file, group, row = sample.location
                if held is None or held[0] != (file, group):
                    held = (file, group), self._column(files, file, group)
                if row >= len(held[1]):
                    expected = f"a row {row} in row group {group}, of which it has {len(held[1])}"
                    raise DataError(f"{shortened(self.files[file])}: expected {expected}; the file is damaged")
                return held[1][row].as_py() or b""

            yield read

    def _column(self, files: Files, file: int, group: int) -> Any:
        """The bytes of the images of a row group: an array of pyarrow."""

        def rows(stream: BinaryIO) -> Any:
            table = _opened(stream, self.files[file]).read_row_group(group, columns=[self.column])
            values = table.column(0).combine_chunks()
            return values.field("bytes") if hasattr(values, "field") else values

        return _checked(self.files[file], lambda: files.using(self.files[file], rows))


def list_parquet(path: str, config: DataConfig) -> tuple[Samples, tuple[str, ...], int]:
    """The rows of Parquet files as they are stored, the names of the classes if the files hold them, and 0.

    Raises
    ------
    DataError
        There is no such file, one is not a Parquet file or is damaged, has no column of images, or labels that are not
        integers.

    >>> list_parquet("/nowhere/a.parquet", DataConfig(path="/nowhere/a.parquet"))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere/a.parquet: no such file or folder
    """
    files = matching(path, ".parquet")
    keys: list[bytes] = []
    locations: list[Any] = []
    labels: list[Any] = []
    classes: tuple[str, ...] = ()
    with Files() as opened:
        for number, file in enumerate(files):
            groups, found, names = _checked(
                file,
                lambda file=file: opened.using(file, lambda stream: _index(stream, file, config)),  # type: ignore[misc]
            )
            if number and names != classes:
                raise DataError(f"{shortened(file)}: expected the classes of {shortened(files[0])}, got other names")
            classes = names
            prefix = os.path.basename(file).encode() + b"/"
            keys += [prefix + b"%010d" % row for row in range(len(found))]
            rows = np.concatenate([np.arange(0), *(np.arange(count) for count in groups)])
            locations.append(np.stack([np.full(len(rows), number), np.repeat(np.arange(len(groups)), groups), rows], 1))
            labels.append(found)
    if not keys:
        raise DataError(f"{shortened(path)}: expected images, got no rows")
    origin = ParquetFiles(tuple(files), config.image_column)
    return Samples(origin, Names.of(keys), np.concatenate(locations), np.concatenate(labels)), classes, 0


def _opened(stream: BinaryIO, file: str) -> Any:
    """pyarrow's file."""
    with extra("images"):
        import pyarrow.parquet

    stream.seek(0)
    try:
        return pyarrow.parquet.ParquetFile(stream)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{shortened(file)}: expected a Parquet file: {message(error)}") from None


def _checked(file: str, call: Callable[[], Any]) -> Any:
    """The result of a call to pyarrow."""
    with extra("images"):
        import pyarrow

    try:
        return call()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{shortened(file)}: expected a Parquet file: {message(error)}") from None


def _index(stream: BinaryIO, file: str, config: DataConfig) -> tuple[list[int], Any, tuple[str, ...]]:
    """Rows of each row group, labels of all rows, names of the classes."""
    import pyarrow

    parquet = _opened(stream, file)
    schema, where = parquet.schema_arrow, shortened(file)
    image, label = config.image_column, config.label_column
    if image not in schema.names:
        raise DataError(f"{where}: expected a column '{image}' (data.image_column), got {shortened(str(schema.names))}")
    kind = schema.field(image).type
    if pyarrow.types.is_struct(kind) and "bytes" in [kind.field(index).name for index in range(kind.num_fields)]:
        kind = kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise DataError(
            f"{where}: column '{image}': expected bytes of images, or structs of bytes and path, got "
            f"{shortened(str(schema.field(image).type))}"
        )
    metadata = parquet.metadata
    groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    if config.labels is False or label not in schema.names:
        if config.labels is True:
            raise DataError(
                f"{where}: expected a column '{label}' (data.label_column), got {shortened(str(schema.names))}"
            )
        return groups, np.full(sum(groups), UNLABELLED), ()
    kind = schema.field(label).type
    if not pyarrow.types.is_integer(kind):
        raise DataError(
            f"{where}: column '{label}': expected the number of a class, 0, 1, …, got {kind}; write numbers, "
            "name another column in data.label_column, or set data.labels: false"
        )
    column = parquet.read(columns=[label]).column(0)
    values = column.cast(pyarrow.int64()).fill_null(UNLABELLED).to_numpy()
    return groups, values, _class_names(schema, label)


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The names of a ClassLabel of Hugging Face's `datasets`, if the schema holds them."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        names = feature["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()
