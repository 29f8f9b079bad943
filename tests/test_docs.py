"""The READMEs keep to the code: commands run, or at least parse; examples run; files and sections exist."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ("simmatch", "cluster", "jobs", "infra"))]
NOT_RUN = "not run in tests"
"""In the comment behind a command that takes too long, or needs what a test machine lacks."""

OF_A_RUN = (
    "checkpoints/", "checkpoints/constants/", "commits/", "events/", "figures/", "model/", "profile/", "results/",
    "journal/", "models/", "report.md", "set_aside.jsonl", "snapshots/", "summary.json", "tables.md",
)  # fmt: skip
"""Files of a run, not of the project."""

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROOMS = "simmatch|cluster|jobs|tests|infra"


def name_of(readme: Path) -> str:
    return str(readme.relative_to(ROOT))


def blocks(readme: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(readme.read_text(encoding="utf-8")) if kind == language]


def commands() -> list[tuple[str, bool]]:
    """Every command of the READMEs, in order, and whether it is to be run."""
    lines = [
        line for readme in READMES for block in blocks(readme, "sh") for line in block.splitlines() if line.strip()
    ]
    return [(line.partition("  #")[0].strip(), NOT_RUN not in line) for line in lines]


def test_the_readme_can_be_read_to_its_end() -> None:
    assert len(READMES[0].read_text(encoding="utf-8").splitlines()) <= 130


def test_commands_that_are_not_run_name_jobs_options_and_targets_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    given = [command for command, run in commands() if not run]
    assert len(given) > 10
    for command in given:
        words = shlex.split(command.rpartition(" -- ")[2])
        while "=" in words[0]:
            words = words[1:]
        if words[:2] == ["python", "-m"] and words[2].startswith("jobs."):
            importlib.import_module(words[2])._parser().parse_args(words[3:])
            assert all(Path(word).exists() for word in words if word.endswith(".yaml")), command
        elif words[0] == "make":
            assert words[1] in targets, command
        else:
            assert words[0] in ("curl", "docker", "kubectl", "pip", "python", "mlflow", "mosquitto_pub", "ray"), command


FORKS = """
import json, os, runpy, sys

import jobs.pretrain, jobs.stream, jobs.sync

for line in sys.stdin:
    module, words, log = json.loads(line)
    number = os.fork()
    if number == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv[1:] = words
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)
"""
"""Runs modules as `python -m` does, in processes that have imported most of what they need. Prints their statuses."""

STARTS_RAY = ("jobs.doctor", "jobs.pretrain")


def test_commands_run(tmp_path: Path) -> None:
    """In the order of the READMEs, in a folder that holds what a checkout holds."""
    for name in ("simmatch", "cluster", "jobs", "infra", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "python").symlink_to(sys.executable)
    given = [command for command, run in commands() if run]
    assert any("jobs.pretrain" in command for command in given)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "output"
    where: dict[str, Any] = {"cwd": tmp_path, "env": environment, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **where
    ) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None
        for command in given:
            words = shlex.split(command)
            if words[:2] == ["python", "-m"] and (words[2] not in STARTS_RAY or "--dry-run" in words):
                print(json.dumps([words[2], words[3:], str(log)]), file=forks.stdin, flush=True)
                status = int(forks.stdout.readline())
            else:
                words = [sys.executable if word == "python" else word for word in words]
                with log.open("w") as output:
                    status = subprocess.run(words, stdout=output, stderr=output, timeout=180, **where).returncode
            assert status == 0, f"{command}\n{log.read_text()[-4000:]}"


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_examples_run(readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of a page share their names; `x.shape  # [8, 64]` states what the line gives."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for text in blocks(readme, "python"):
        exec(compile(text, name_of(readme), "exec"), names)
        for expression, shape in re.findall(r"^(\S.*\.shape)  # (\[[\d, ]+\])", text, re.MULTILINE):
            assert str(list(eval(expression, names))) == shape, expression


@pytest.mark.parametrize("page", [*READMES, ROOT / "simmatch/LOG.md"], ids=name_of)
def test_tables_are_tables(page: Path) -> None:
    """A line of bars that is no row of a table is shown as it is; cells too many are not shown at all."""
    text = page.read_text(encoding="utf-8")
    lines, rows = text.splitlines(), set[int]()
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open" and token.map is not None:
            first, end = token.map
            rows.update(range(first, end))
            cells = [lines[number].replace(r"\|", "").count("|") for number in range(first, end)]
            assert set(cells) == {cells[0]}, f"{name_of(page)}:{first + 1}"
        elif token.type == "fence" and token.map is not None:
            rows.update(range(*token.map))
    lost = [number + 1 for number, line in enumerate(lines) if line.startswith("|") and number not in rows]
    assert not lost, f"{name_of(page)}: lines {lost}"


def test_the_sensors_of_the_example_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples, one with a missing value, and a label that comes late."""
    from jobs.streaming.config import parse_stream
    from jobs.streaming.records import LateLabel, Record
    from jobs.streaming.sources import open_source
    from simmatch.documents import load_yaml

    readme = ROOT / "jobs" / "README.md"
    [configuration] = blocks(readme, "yaml")
    [csv] = re.findall(r"^```\n(id,.*?)^```$", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "plant.csv").write_text(csv)
    monkeypatch.chdir(tmp_path)
    source = open_source(parse_stream(load_yaml(configuration)).source, {})
    first, second, late = [delivery.item for delivery in source.poll(10, 1.0)]
    source.close()
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (first.label, first.values.tolist()) == ("idle", [[0.19, 39.93, 2.93]])
    assert str(second.values.tolist()) == "[[nan, 39.95, 2.99]]"
    assert late == LateLabel("s1", "run")


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_files_and_sections_that_it_names_exist(readme: Path) -> None:
    text = BLOCK.sub("", readme.read_text(encoding="utf-8"))
    named = re.findall(r"`([\w./-]+\.(?:py|md|yaml|lock|toml)|[\w/-]+/)`", text)
    for name in named:
        if name.startswith("runs/") or name in OF_A_RUN:
            continue
        bases = [ROOT, readme.parent, ROOT / "jobs/configs"]
        known = name == "config.yaml" or any((base / name).exists() for base in bases)
        assert known, f"{name_of(readme)} names {name}"
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, section = link.partition("#")
        target = readme.parent / path
        assert target.exists(), f"{name_of(readme)} links to {link}"
        if section:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in sections(headings), link


def sections(headings: list[str]) -> list[str]:
    """What links to headings are called; of equal ones the second is `…-1`."""
    names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    earlier = (names[:place].count(name) for place, name in enumerate(names))
    return [f"{name}-{count}" if count else name for name, count in zip(names, earlier, strict=True)]
