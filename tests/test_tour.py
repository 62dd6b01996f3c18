"""The tour: each of its files executed, and what it must show."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOUR = Path(__file__).parent.parent / "examples" / "tour"
FILES = sorted(TOUR.glob("*.py"))
SECONDS = 60  # the deadline of each run

needs_gevent = pytest.mark.skipif(
    not importlib.util.find_spec("gevent"), reason="gevent is not installed"
)


def shown(name: str, cwd: Path) -> str:
    """What a file of the tour prints, with two workers."""
    (file,) = TOUR.glob(f"*_{name}.py")
    done = subprocess.run(
        [sys.executable, "-m", "taskrun", "exec", str(file), "-j", "2", "--output", "raw"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def found(pattern: str, text: str) -> list[str]:
    """The groups of the first match; fails without one."""
    match = re.search(pattern, text, re.MULTILINE)
    assert match, f"no {pattern!r} in\n{text}"
    return list(match.groups())


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_each_opens_with_three_sentences_and_is_in_the_index(file: Path) -> None:
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    assert len(re.findall(r"[.](?=\s|$)", text)) == 3, text
    index = (TOUR / "README.md").read_text().splitlines()
    assert [line for line in index if line.startswith(f"| [{file.name}]({file.name}) | ")]


def test_processes_count_primes_and_share_no_memory(tmp_path: Path) -> None:
    out = shown("process", tmp_path)
    assert "7,837 primes below 80,000" in out
    seen = re.findall(r"^process \d+ has seen (\d) of 8 calls$", out, re.MULTILINE)
    assert sum(map(int, seen)) == 8


def test_threads_share_the_balance_of_one_process(tmp_path: Path) -> None:
    out = shown("thread", tmp_path)
    (threads,) = found(r"20 calls in (\d+) threads of 1 process", out)
    assert 1 < int(threads) <= 20
    assert "balance 210, and no deposit is lost" in out


def test_pids_are_a_family(tmp_path: Path) -> None:
    out = shown("pids", tmp_path)
    assert len(re.findall("^template", out, re.MULTILINE)) == 1
    workers = re.split(r"^   worker ", out, flags=re.MULTILINE)[1:]
    calls = [
        (call, parent == worker.split()[0])
        for worker in workers
        for call, parent in re.findall(r"(look\[\d\]) and its shell, a child of (\d+)", worker)
    ]
    assert sorted(calls) == [(f"look[{n}]", True) for n in range(4)]


def test_a_queue_gives_each_order_to_one_cook(tmp_path: Path) -> None:
    out = shown("queue", tmp_path)
    assert "12 dishes: " in out
    assert len(re.findall(r"^(ada|bo) has cooked \w+ in process \d+$", out, re.MULTILINE)) == 12


def test_the_keeper_answers_each_guess_while_it_runs(tmp_path: Path) -> None:
    assert shown("pipe", tmp_path).splitlines() == [
        "50? lower", "25? higher", "37? higher", "43? lower", "40? higher", "41? higher",
        "42? right", "the keeper has counted 7 guesses",
    ]  # fmt: skip


def test_the_dict_and_the_list_hold_what_all_have_written(tmp_path: Path) -> None:
    out = shown("manager", tmp_path)
    assert "25 different words, more than once: a, and, in, the" in out
    assert "beautiful, plenty, pussycat, wrapped" in out


def test_the_lock_keeps_verses_whole(tmp_path: Path) -> None:
    out = shown("lock", tmp_path)
    assert "Row, row, row your boat\nGently down the stream\n" in out
    assert len(out.splitlines()) == 8


def test_a_pool_shows_where_calls_and_callbacks_run(tmp_path: Path) -> None:
    out = shown("pool", tmp_path)
    (parent,) = found(r"the pool is made in process (\d+)", out)
    for way in ("apply", "apply_async", "callback"):
        assert parent not in found(rf"{way} +[\d.]+ s in processes (\d+), (\d+)", out)
    assert found(r"the callback was called in process (\d+)\n", out) == [parent]


@needs_gevent
def test_greenlets_make_words_of_letters(tmp_path: Path) -> None:
    out = shown("greenlet", tmp_path)
    assert out.splitlines() == [
        "'a' ' ' -> 'a'",
        "'p' 'e' 'a' ' ' -> 'pea'",
        "'g' 'r' 'e' 'e' 'n' ' ' -> 'green'",
        "'b' 'o' 'a' 't' -> 'boat'",
    ]


@needs_gevent
def test_greenlets_wait_all_at_once(tmp_path: Path) -> None:
    out = shown("gevent", tmp_path)
    (waited,) = found(r"100 calls in 1 process waited ([\d.]+) s", out)
    (took,) = found(r"all together took ([\d.]+) s", out)
    assert float(waited) >= 10
    assert float(took) < float(waited) / 2


def test_events_call_their_handlers_in_order(tmp_path: Path) -> None:
    out = shown("events", tmp_path)
    assert out.splitlines() == [
        "light on", "heating", "light off", "cosy", "asleep after 4 events",
    ]  # fmt: skip


def test_only_blocking_io_waits_for_each_in_turn(tmp_path: Path) -> None:
    out = shown("io_modes", tmp_path)
    ways = ("blocking", "non_blocking", "multiplexed", "asynchronous")
    times = [
        int(found(rf"^{way} +(\d+) ms, of these +\d+ ms of computing$", out)[0]) for way in ways
    ]
    assert times[0] >= 500  # ten times 50 ms
    assert min(times) == min(times[1:]) < times[0]


@pytest.mark.parametrize("name", ["select_server", "selectors_server"])
def test_a_server_answers_all_its_clients(name: str, tmp_path: Path) -> None:
    out = shown(name, tmp_path)
    assert "20 clients have come and left" in out
    assert "HELLO FROM 0 ... HELLO FROM 19" in out
