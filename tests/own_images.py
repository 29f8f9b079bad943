"""Own images in every layout, written by other code than that which reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("cat", "dog", "élan")
Item = tuple[str, int, bytes]
"""Key without suffix, class or −1, bytes of a PNG file."""


def png(value: int, size: tuple[int, int] = (6, 8), channels: int = 3) -> bytes:
    """A blank image of this grey level: a label of its own to find it again by."""
    file = io.BytesIO()
    Image.new("RGB" if channels == 3 else "L", size[::-1], (value,) * channels if channels == 3 else value).save(
        file, "PNG"
    )
    return file.getvalue()


def items(count: int = 30) -> list[Item]:
    return [(f"{index:03d}", index % len(CLASSES), png(index)) for index in range(count)]


def write_folder(folder: Path, some: list[Item]) -> Path:
    for key, label, data in some:
        path = folder / (CLASSES[label] if label >= 0 else "") / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_tars(folder: Path, some: list[Item], shards: int = 3) -> Path:
    """Labels in turn as key.cls and as key.json."""
    for shard in range(shards):
        members = []
        for key, label, data in some[shard::shards]:
            members.append((f"{key}.png", data))
            if label >= 0:
                text = ("cls", str(label)) if int(key) % 2 else ("json", json.dumps({"label": label, "more": "x"}))
                members.append((f"{key}.{text[0]}", text[1].encode()))
        write_tar(folder / f"shard-{shard:03d}.tar", members)
    return folder


def write_parquet(
    path: Path, some: list[Item], *, structs: bool = True, names: Sequence[str] = CLASSES, **options: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [data for _, _, data in some]
    column = pa.array([{"bytes": data, "path": None} for data in images] if structs else images)
    table = pa.table({"image": column, "label": pa.array([label for _, label, _ in some])})
    if names:
        features = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, **{"row_group_size": 4, **options})
    return path
