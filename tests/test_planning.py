"""What runs, in which order, why, with which parameters: and what is refused before."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NewType, Optional, Union

import pytest

from taskrun import each, result, task
from taskrun.errors import UsageError
from taskrun.loading import Loaded, gather
from taskrun.model import Each, Plan, Result, Task
from taskrun.parameters import Misfit, Unsupported, amount, convert
from taskrun.planning import choose, estimate, in_order, left_out, make_plan


def named(name: str, *needs: Task, **options: Any) -> Task:
    return task(lambda: None, name=name, after=needs, **options)


def plan(tasks: Sequence[Task], targets: Sequence[str] = (), params: Sequence[str] = ()) -> Plan:
    return make_plan(Loaded(gather(tasks)), targets, params)


def names(made: Plan) -> list[str]:
    return [one.name for one in made.tasks]


def refused(tasks: Sequence[Task], targets: Sequence[str] = (), *params: str) -> str:
    with pytest.raises(UsageError) as raised:
        plan(tasks, targets, params)
    assert raised.value.exit_status == 2
    return str(raised.value)


# -- what runs ------------------------------------------------------------------------


def test_all_tasks_run_when_none_is_named() -> None:
    made = plan([named("a"), named("b"), named("c", default=False)])
    assert names(made) == ["a", "b"] and made.targets == {"a", "b"}
    assert made.reasons == {"a": "all tasks run", "b": "all tasks run"}


def test_only_default_tasks_and_their_needs_run_where_some_are_marked() -> None:
    a = named("a")
    made = plan([a, named("b"), named("c", a, default=True)])
    assert names(made) == ["a", "c"] and made.targets == {"c"}
    assert made.reasons == {"c": "default=True", "a": "needed by c"}


def test_a_named_task_pulls_in_what_it_needs_in_the_order_of_the_file() -> None:
    a, b = named("a"), named("b")
    made = plan([a, b, named("c", b, a), named("d")], ["c"])
    assert names(made) == ["a", "b", "c"]
    assert made.reasons["c"] == "named on the command line"
    assert made.reasons["b"] == "needed by c"


def test_a_task_may_be_defined_before_what_it_needs() -> None:
    late = named("late")
    early = named("early")
    early.params["x"] = Result(late)
    assert names(plan([early, late])) == ["late", "early"]


def test_a_task_marked_false_runs_where_it_is_needed_or_named() -> None:
    hidden = named("hidden", default=False)
    assert names(plan([hidden, named("a", hidden)])) == ["hidden", "a"]
    assert names(plan([hidden, named("a")], ["hidden"])) == ["hidden"]


def test_an_unknown_task_is_told_with_the_near_name() -> None:
    assert "no task 'totl' in this run; did you mean 'total'?" in refused(
        [named("total")], ["totl"]
    )
    assert "there are a, b" in refused([named("a"), named("b")], ["zzzz"])


def test_nothing_to_run_says_what_there_is() -> None:
    assert "name one of a" in refused([named("a", default=False)])
    assert "work needs -p x=..." in refused([needs_x()])


# -- order and cycles -----------------------------------------------------------------


def test_a_cycle_is_shown_as_a_chain() -> None:
    a = named("a")
    b = named("b", a)
    a.params["x"] = Each(task=b)
    assert refused([named("z", a)]) == "tasks need each other in a cycle: a -> b -> a"
    a.params["x"] = Each(task=a)
    assert "a -> a" in refused([a])


def test_a_long_cycle_is_shortened() -> None:
    chain = [named("t0")]
    for number in range(1, 100):
        chain.append(named(f"t{number}", chain[-1]))
    chain[0].params["x"] = Result(chain[-1])
    assert " -> ... -> " in refused(chain)


def test_a_chain_of_thousands_of_tasks_is_no_problem() -> None:
    chain = [named("t0")]
    for number in range(1, 5000):
        chain.append(named(f"t{number}", chain[-1]))
    made = plan(chain, ["t4999"])
    assert list(made.tasks) == chain
    assert in_order(reversed(chain)) == chain


# -- run parameters -------------------------------------------------------------------


def needs_x(name: str = "work", **options: Any) -> Task:
    def work(x: int): ...

    return task(work, name=name, **options)


def seeded(name: str) -> Task:
    def work(seed: str = "s", depth: int = 2): ...

    return task(work, name=name)


def test_a_parameter_is_set_in_every_task_that_has_it_or_in_one() -> None:
    a, b = seeded("a"), seeded("b.c")
    made = plan([a, b], (), ["b.c.depth=9", "depth=3", "seed=x=y"])
    assert made.constants == {"a": {"depth": 3, "seed": "x=y"}, "b.c": {"depth": 9, "seed": "x=y"}}
    assert plan([a], (), ["depth=1", "depth=2"]).constants == {"a": {"depth": 2}}
    assert plan([a]).constants == {}


def test_a_task_that_lacks_a_parameter_is_left_out_of_a_run_of_everything() -> None:
    tasks = [seeded("a"), needs_x()]
    assert names(plan(tasks)) == ["a"]
    assert left_out(Loaded(gather(tasks)), {}) == {"work": ["x"]}
    assert names(plan(tasks, (), ["x=3"])) == ["a", "work"]


def test_a_missing_parameter_is_an_error_where_its_task_is_named_or_needed_or_marked() -> None:
    work = needs_x()
    assert "work (named on the command line) needs a value for x: -p x=..." in refused(
        [work], ["work"]
    )
    assert "work (needed by a) needs a value for x" in refused([named("a", work)])
    assert "work (default=True) needs" in refused([needs_x(default=True), named("a")])


def test_what_only_a_left_out_task_needs_is_left_out_quietly() -> None:
    first = needs_x("first")

    def second(y: int, x=result(first)): ...

    assert names(plan([first, task(second), named("a")])) == ["a"]


def test_a_parameter_of_a_task_that_takes_no_part_may_be_set() -> None:
    # It may be submitted.
    made = plan([named("main"), seeded("crawl")], ["main"], ["depth=5"])
    assert made.constants == {"crawl": {"depth": 5}} and names(made) == ["main"]


def test_values_that_are_given_are_taken_as_they_are() -> None:
    loaded = Loaded(gather([needs_x(), seeded("a")]))
    made = make_plan(loaded, ["work", "a"], ["depth=3"], {"x": [1], "a.depth": 4})
    assert made.constants == {"work": {"x": [1]}, "a": {"depth": 4}}
    with pytest.raises(UsageError, match="did you mean 'depth'"):
        make_plan(loaded, (), (), {"dpth": 4})


def test_parameters_that_cannot_be_set_are_told() -> None:
    source = seeded("source")

    def good(url=each(source), n: int = 1): ...

    tasks = [source, task(good, name="fan")]
    assert "did you mean 'depth'?" in refused(tasks, (), "dpth=3")
    assert "no task has a parameter 'zzz'; there are" in refused(tasks, (), "zzz=3")
    assert "task fan has no parameter 'depth'; source has one" in refused(tasks, (), "fan.depth=3")
    assert "task fan has no parameter 'm'; there are n" in refused(tasks, (), "fan.m=3")
    assert "no task 'fam' in this run; did you mean 'fan'?" in refused(tasks, (), "fam.n=3")
    assert "in fan it comes from each(source), not from -p" in refused(tasks, (), "url=3")
    assert "in fan it comes from each(source), not from -p" in refused(tasks, (), "fan.url=3")
    assert "-p takes name=value" in refused(tasks, (), "depth")
    assert "-p takes name=value" in refused(tasks, (), "=3")
    assert "there is none to set" in refused([named("a")], (), "x=3")
    assert refused(tasks, (), "depth=3.5") == "source: depth='3.5' does not fit; expected int"


def test_a_parameter_that_a_function_takes_by_position_only_is_told() -> None:
    def work(x=1, /): ...

    assert "takes it by position only" in refused([task(work)], (), "x=2")


def test_text_annotations_are_resolved_where_they_can_be() -> None:
    def work(path: Path = Path(), ghost: Ghost = None): ...  # noqa: F821

    tasks = [task(work)]
    assert plan(tasks, (), ["path=a/b"]).constants == {"work": {"path": Path("a/b")}}
    assert "its annotation 'Ghost' is not known" in refused(tasks, (), "ghost=3")


# -- text to value --------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1
    BLUE = "blue-ish"


Url = NewType("Url", str)

FITS: list[tuple[str, Any, Any]] = [
    ("-3", int, -3),
    ("1e3", float, 1000.0),
    ("", str, ""),
    ("YES", bool, True),
    ("off", bool, False),
    ("0", bool, False),
    ("a/b", Path, Path("a/b")),
    ("b", Literal["a", "b"], "b"),
    ("2", Literal[1, 2], 2),
    ("RED", Colour, Colour.RED),
    ("1", Colour, Colour.RED),
    ("blue-ish", Colour, Colour.BLUE),
    ("1, 2,3", list[int], [1, 2, 3]),
    ("", list[int], []),
    ("a,b", list, ["a", "b"]),
    ("a,b", list[Path], [Path("a"), Path("b")]),
    ("3", int | None, 3),
    ("none", Optional[int], None),  # noqa: UP045
    ("none", str | None, None),
    ("3", str | int, 3),
    ("x", Union[Path, int, str], Path("x")),  # noqa: UP007
    ("x", Url, "x"),
    ("x", Any, "x"),
]


@pytest.mark.parametrize(("text", "kind", "value"), FITS, ids=lambda value: str(value))
def test_text_becomes_what_the_annotation_says(text: str, kind: Any, value: Any) -> None:
    made = convert(text, kind)
    assert made == value and type(made) is type(value)


MISFITS: list[tuple[str, Any, str]] = [
    ("x", int, "int"),
    ("x", bool, "true, false, yes, no, on, off, 1 or 0"),
    ("c", Literal["a", "b", 3], "'a', 'b' or '3'"),
    ("green", Colour, "'RED' or 'BLUE'"),
    ("1,x", list[int], "a comma separated list of int"),
    ("x", int | None, "int or none"),
]


@pytest.mark.parametrize(("text", "kind", "expected"), MISFITS)
def test_text_that_does_not_fit_is_told_with_what_would(
    text: str, kind: Any, expected: str
) -> None:
    with pytest.raises(Misfit) as raised:
        convert(text, kind)
    assert str(raised.value) == expected


@pytest.mark.parametrize("kind", [dict, dict[str, int], bytes, object, tuple[int, ...]])
def test_an_annotation_that_no_text_fits_is_told(kind: Any) -> None:
    with pytest.raises(Unsupported, match="text cannot be made into"):
        convert("x", kind)


def test_without_annotation_the_default_says_the_type() -> None:
    def work(a, b=1, c=1.5, d=True, e="x", f=None, g=(1,)): ...

    params = [f"{name}=1" for name in "abcdefg"]
    values = plan([task(work)], (), params).constants["work"]
    assert values == {"a": "1", "b": 1, "c": 1.0, "d": True, "e": "1", "f": "1", "g": "1"}
    assert type(values["d"]) is bool and type(values["c"]) is float


@pytest.mark.parametrize(
    ("value", "bytes_"),
    [("4G", 4e9), ("512M", 512e6), ("1.5GiB", 1.5 * 2**30), ("2kb", 2000.0), ("7", 7.0),
     (7, 7.0), ("3ki", 3072.0), ("9B", 9.0)],
)  # fmt: skip
def test_memory_takes_sizes(value: object, bytes_: float) -> None:
    assert amount("memory", value) == bytes_


@pytest.mark.parametrize("value", ["", "G", "4X", "4GG", "-1", "nan", "inf", -1, True, None, "i"])
def test_what_is_no_amount_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="memory must be"):
        amount("memory", value)


# -- how many calls -------------------------------------------------------------------


def test_calls_are_counted_where_that_is_known_before_the_run() -> None:
    urls, pairs, nothing = named("urls"), [1, 2], each([])

    def fetch(url=each(urls)): ...

    fetched = task(fetch)

    def words(page=each(fetched), source=each(urls)): ...

    def grid(a=each(pairs), b=each(range(1000)), again=each(pairs)): ...

    def mixed(a=each(pairs), url=each(urls)): ...

    def flat(word=each(fetched, flat=True)): ...

    def none(x=nothing): ...

    def total(x=result(fetched)): ...

    def stream(url=each(urls)):
        yield url

    streamed = task(stream)

    def lines(line=each(streamed)): ...

    made = [urls, *map(task, (grid, mixed, none, total))]
    made += [fetched, *map(task, (words, flat))]
    made += list(gather([task(lines)]).values())
    assert estimate(in_order(made)) == {
        "urls": "1 call",
        "grid": "2,000 calls",
        "mixed": "2 per item of urls",
        "none": "0 calls",
        "fetch": "1 per item of urls",
        "total": "1 call",
        "words": "1 per item of urls",
        "flat": "1 per item of urls and item of fetch",
        "stream": "1 per item of urls",
        "lines": "1 per item of urls and item of stream",
    }


def test_what_is_chosen_by_default_can_be_asked_without_planning() -> None:
    assert choose(Loaded(gather([named("a")])), (), {}) == {"a": "all tasks run"}
