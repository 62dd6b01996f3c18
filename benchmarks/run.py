"""Run the benchmarks: ``python benchmarks/run.py [NAME...] [--rounds N]``; Linux only.

Prints each as it ends, and keeps the last result of each in ``RESULTS.md``.  Ends with
status 1 if a target was missed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import engines
import network_suite
import servers
import suite
from measure import (
    JOBS,
    BenchmarkError,
    OthersLoad,
    Unavailable,
    adopt_orphans,
    python_version,
    wait_until_quiet,
)
from suite import Benchmark

BENCHMARKS = (
    *suite.BENCHMARKS,
    *servers.BENCHMARKS,
    *network_suite.BENCHMARKS,
    *engines.BENCHMARKS,
)
RESULTS = Path(__file__).parent / "RESULTS.md"
COLUMNS = (
    "benchmark", "what", "taskrun", "compared with", "its figure", "ratio", "target", "verdict",
    "rounds", "others' load", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """The figures of one benchmark, a number per round for each side."""

    benchmark: Benchmark
    ours: list[float]
    peer: list[float]
    others: float
    """Cores that other programs of the machine used meanwhile."""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.peer)

    @property
    def reached(self) -> bool:
        return self.benchmark.reached(self.ratio)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(f"{one.name:20} {one.what}, {target(one)}" for one in BENCHMARKS))
        return 0
    adopt_orphans()
    # In the project's own folder Ray's workers would import taskrun/ from there, which is not
    # the whole of what is installed.
    os.chdir(JOBS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what runs, as Ctrl-C does
    chosen = [one for one in BENCHMARKS if not options.names or one.name in options.names]
    attempts = [attempt(one, options) for one in chosen]
    results = [measured for measured in attempts if isinstance(measured, Measured)]
    if not options.dry:
        RESULTS.write_text(document(results, RESULTS.read_text() if RESULTS.exists() else ""))
    return 0 if None not in attempts and all(one.reached for one in results) else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    names = [one.name for one in BENCHMARKS]
    parser = argparse.ArgumentParser(description="Benchmarks: " + ", ".join(names))
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; without: all")
    parser.add_argument("--rounds", type=int, help="how many, instead of each one's own number")
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="S",
        help="before each round wait up to S seconds until the machine is quiet",
    )  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="leave RESULTS.md as it is")
    parser.add_argument("--list", action="store_true", help="what there is, and its target")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(names):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(names)}")
    return options


def attempt(benchmark: Benchmark, options: argparse.Namespace) -> Measured | Unavailable | None:
    """The figures, or why there are none to be had here; None where it failed."""
    print(f"{benchmark.name}: {benchmark.what}", flush=True)
    try:
        measured = measure(benchmark, options.rounds or benchmark.rounds, options.patience)
    except Unavailable as reason:
        print(f"  left out: {reason}", flush=True)
        return reason
    except BenchmarkError as error:
        print(f"  FAILED: {error}", flush=True)
        return None
    show(measured)
    return measured


def measure(benchmark: Benchmark, rounds: int, patience: float) -> Measured:
    """The sides take turns, and every other round the order is reversed."""
    ours: list[float] = []
    peer: list[float] = []
    others: list[float] = []
    sides = [(benchmark.ours, ours), (benchmark.peer, peer)]
    for _ in range(rounds):
        wait_until_quiet(patience)
        load = OthersLoad()
        for side, figures in sides:
            figures.append(side())
        sides.reverse()
        others.append(load.cores())
    return Measured(benchmark, ours, peer, statistics.mean(others))


# -- how results are shown ------------------------------------------------------------


def show(measured: Measured) -> None:
    one = measured.benchmark
    for name, figures in (("taskrun", measured.ours), (one.peer_name, measured.peer)):
        spread = f"{figure(min(figures))} to {figure(max(figures))}"
        print(f"  {name:38} {figure(statistics.median(figures)):>9} {one.unit} ({spread})")
    print(
        f"  ratio {measured.ratio:.3g}, target {target(one)}: {verdict(measured)}"
        f" ({len(measured.ours)} rounds, other programs used {measured.others:.2f} cores)",
        flush=True,
    )


def figure(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def target(benchmark: Benchmark) -> str:
    return f"{'at least' if benchmark.at_least else 'at most'} {benchmark.target:g}"


def verdict(measured: Measured) -> str:
    return "reached" if measured.reached else "MISSED"


def row(measured: Measured) -> str:
    one = measured.benchmark
    cells = (
        one.name, one.what,
        f"{figure(statistics.median(measured.ours))} {one.unit}",
        one.peer_name, f"{figure(statistics.median(measured.peer))} {one.unit}",
        f"{measured.ratio:.3g}", target(one), verdict(measured),
        str(len(measured.ours)), f"{measured.others:.2f}", datetime.date.today().isoformat(),
    )  # fmt: skip
    return table_line(cells)


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def document(results: Sequence[Measured], old: str) -> str:
    """RESULTS.md with the new results, and the old rows of what was not run."""
    rows = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| ")}
    rows |= {measured.benchmark.name: row(measured) for measured in results}
    lines = [rows[one.name] for one in BENCHMARKS if one.name in rows]
    return "\n".join([
        "# Results of the benchmarks",
        "",
        "Written by `make bench` (`make bench ARGS=tiny` for one of them); what each measures is",
        "said in [docs/benchmarks.md](../docs/benchmarks.md).  Figures are medians; the load is",
        "in cores that other programs of the machine used meanwhile.",
        f"This machine: {os.cpu_count()} cores, {os.uname().sysname}, {python_version()}.",
        "",
        table_line(COLUMNS),
        "|" + "---|" * len(COLUMNS),
        *lines,
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
