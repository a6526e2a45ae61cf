"""Options, the choice of cells, the gate, and the fixture that measures a cell and prints its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from bench import environment, gate
from bench.interleave import Interleaved, NotRun, Variant
from bench.others import Others, watched
from bench.precision import DEVICE
from bench.rows import Row, summarize
from bench.table import plain_table

Measure = Callable[..., list[Row]]
ENVIRONMENT = pytest.StashKey[dict[str, Any]]()
FEWEST, MOST = 5, 50
"""Rounds of a cell, unless ``--rounds`` says otherwise."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("prelora bench")
    group.addoption("--full", action="store_true", help="measure every cell, not only the default ones")
    group.addoption("--rounds", type=int, help=f"rounds of every cell; else as time allows, {FEWEST} to {MOST}")
    group.addoption("--seconds", type=float, help="time for a cell's rounds; else each suite's own")
    group.addoption(
        "--compiled",
        action="store_true",
        default=DEVICE.type == "cuda",
        help="also measure what torch.compile makes of the peers; the default on a GPU, minutes a cell on a CPU",
    )
    group.addoption("--no-compiled", dest="compiled", action="store_false", help="leave compiled variants out")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the default cells, unless the command line chooses among all of them."""
    chosen = config.getoption("keyword") or config.getoption("markexpr") or any("::" in arg for arg in config.args)
    if config.getoption("--full") or chosen:
        return
    others = [item for item in items if item.get_closest_marker("default_cell") is None]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item.get_closest_marker("default_cell") is not None]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Take the environment before anything runs: the load is then that of others."""
    session.config.stash[ENVIRONMENT] = environment.environment()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Record the environment beside what pytest-benchmark records itself."""
    machine_info["environment"] = config.stash[ENVIRONMENT]


@pytest.fixture
def green(request: pytest.FixtureRequest) -> dict[str, str]:
    """How the tests of the suite's operators (``OPERATORS`` of its module) ended.

    Fails the cell if they are red: it is neither measured nor reported.
    """
    verdicts = {operator: gate.verdict(operator) for operator in request.module.OPERATORS}
    for operator, verdict in verdicts.items():
        if not verdict.green:
            pytest.fail(f"nothing is measured: the tests of {operator} are red: {verdict.summary}", pytrace=False)
    return {operator: verdict.summary for operator, verdict in verdicts.items()}


@pytest.fixture
def measure(benchmark: Any, green: dict[str, str], request: pytest.FixtureRequest) -> Measure:
    """A function that times a cell's variants in turns, and records and prints their rows."""

    def run(suite: str, cell: str, variants: Sequence[Variant | NotRun], seconds: float) -> list[Row]:
        interleaved = Interleaved(variants, DEVICE)
        benchmark.group = suite
        if not benchmark.disabled:
            one = interleaved.warm_up()
            seconds = request.config.getoption("--seconds") or seconds
            rounds = request.config.getoption("--rounds") or max(FEWEST, min(MOST, int(seconds / one)))
        with watched() as others:
            benchmark.pedantic(interleaved.round, rounds=1 if benchmark.disabled else rounds)
        rows = summarize(suite, cell, interleaved.variants, interleaved.samples)
        return _record(benchmark, request, green, rows, others, interleaved.samples)

    return run


@pytest.fixture
def record(benchmark: Any, green: dict[str, str], request: pytest.FixtureRequest) -> Measure:
    """A function that runs ``take`` once, and records and prints the rows that it returns."""

    def run(suite: str, take: Callable[[], list[Row]]) -> list[Row]:
        benchmark.group = suite
        with watched() as others:
            rows = benchmark.pedantic(take)
        return _record(benchmark, request, green, rows, others, {})

    return run


def _record(
    benchmark: Any, request: Any, tests: dict[str, str], rows: list[Row], others: Others, samples: Any
) -> list[Row]:
    rows = [replace(row, others=others.share) for row in rows]
    benchmark.extra_info.update(rows=[asdict(row) for row in rows], tests=tests, samples_in_seconds=samples)
    with _uncaptured(request.config):
        print(f"\n{rows[0].suite} {rows[0].cell}, {rows[0].rounds} rounds on {DEVICE}; {others}")
        print(plain_table(rows), flush=True)
    return rows


def _uncaptured(config: pytest.Config) -> Any:
    """Rows are printed as they come: a sweep takes hours."""
    return config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled()


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """None: measure compiled variants too; else why not. Every cell compiles anew, with its own sizes."""
    if not request.config.getoption("--compiled"):
        yield "Inductor takes up to two minutes for each on a CPU: ask with --compiled"
        return
    torch._dynamo.reset()
    yield None
    torch._dynamo.reset()
