"""``@task``, each, result and per_worker: what they make, and what they refuse."""

from __future__ import annotations

import asyncio
import functools
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import taskrun
from taskrun import Future, Skip, as_completed, current, each, per_worker, result, task
from taskrun.api import collecting
from taskrun.errors import ArgumentError, CallSkipped
from taskrun.model import MISSING, Each, Parameter, PerWorker, Result


@task
def urls(seed: str = "http://x/", depth: int = 2) -> list[str]:
    return [f"{seed}{number}" for number in range(depth)]


@task
def streamed():
    yield 1


# -- what a task is -------------------------------------------------------------------


def test_a_bare_decorator_makes_a_task_that_is_still_an_ordinary_function() -> None:
    assert urls.name == "urls"
    assert urls(depth=1) == ["http://x/0"]
    assert urls.options.lane == "process" and urls.options.retries is None


def test_parameters_have_the_source_that_their_default_says() -> None:
    @task
    def many(a: int, b=each(urls), c=result(urls, errors="keep"), d=per_worker(dict), e=5): ...

    assert many.params["a"] == Parameter("a", MISSING, "int")
    assert many.params["b"] == Each(task=urls)
    assert many.params["c"] == Result(urls, "keep")
    assert many.params["d"] == PerWorker(dict)
    assert many.params["e"] == Parameter("e", 5, MISSING)


def test_options_are_kept_in_the_form_that_a_run_needs() -> None:
    @task(name="load", after=urls, retries=3, retry_on=OSError, backoff=1, timeout=2,
          priority=-1, resources={"memory": "4G", "gpu": 1}, always=True, default=False,
          label="{x}")  # fmt: skip
    def work(x=1): ...

    options = work.options
    assert options.name == "load" and options.after == (urls,) and options.retries == 3
    assert options.retry_on == (OSError,) and options.backoff == 1.0 and options.timeout == 2.0
    assert options.resources == {"memory": 4e9, "gpu": 1.0}
    assert options.always is True and options.default is False and options.label == "{x}"


def test_an_option_that_is_none_counts_as_left_out() -> None:
    made = task(urls.function, name="again", timeout=None, retries=None)
    assert made.options.timeout is None and made.options.name == "again"


def test_async_def_gets_the_async_lane_unless_another_is_chosen() -> None:
    async def fetch(): ...

    async def stream():
        yield 1

    assert task(fetch).options.lane == "async"
    assert task(stream).options.lane == "async"
    assert task(fetch, lane="process").options.lane == "process"


def test_parameters_that_no_run_fills_are_left_to_submit() -> None:
    @task
    def work(x, /, *rest, key=each([1]), **more): ...

    assert list(work.params) == ["x", "key"]


def test_a_wrapped_function_shows_the_parameters_of_what_it_wraps() -> None:
    def work(x=each([1, 2])): ...

    @functools.wraps(work)
    def logged(*args, **kwargs):
        return work(*args, **kwargs)

    assert isinstance(task(logged).params["x"], Each)


def test_tasks_are_collected_while_somebody_asks_for_it() -> None:
    with collecting() as outer:
        first = task(lambda: 1, name="first")
        with collecting() as inner:
            second = task(lambda: 1, name="second")
        third = task(lambda: 1, name="third")
    task(lambda: 1, name="fourth")
    assert outer == [first, third] and inner == [second]


def test_outside_a_run_a_coroutine_awaits_what_it_submits() -> None:
    @task
    async def child(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    @task
    async def parent(x: int) -> int:
        total: int = await child.submit(await child.submit(x))
        return total

    assert asyncio.run(parent(1)) == 3
    assert parent.submit(1).result() == 3


def test_outside_a_run_a_call_is_skipped_as_in_one() -> None:
    @task
    def skips() -> None:
        raise Skip("nothing to do")

    @task
    def fails() -> None:
        raise ValueError("bad")

    @task
    def needs(x: object) -> None: ...

    assert repr(skips.submit().exception()) == "CallSkipped('nothing to do')"
    for lacking in (skips.submit(), [{"x": fails.submit()}]):
        assert isinstance(needs.submit(lacking).exception(), CallSkipped)


def test_outside_a_run_a_teardown_gets_the_exceptions_as_in_one() -> None:
    @task
    def fails() -> None:
        raise ValueError("bad")

    @task
    def skips() -> None:
        raise Skip("nothing to do")

    @task(always=True)
    def tidy(*ended: object, more: object = None) -> str:
        return repr((ended, more))

    left = tidy.submit(fails.submit(), [skips.submit()], more={"x": fails.submit()})
    assert left.result() == (
        "((ValueError('bad'), [CallSkipped('nothing to do')]), {'x': ValueError('bad')})"
    )


def test_a_call_that_ends_while_others_are_looked_at_is_not_left_out() -> None:
    class Ending(Future):
        looks = 0

        def done(self) -> bool:
            self.looks += 1
            return self.looks > 1

    ended, ending = Future("first"), Ending("second")
    ended.resolve(1)
    assert list(as_completed([ended, ending])) == [ended, ending]


def test_outside_a_run_current_is_a_stand_in() -> None:
    assert current().call == "" and current().attempt == 1


# -- options that cannot be -----------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"retries": -1}, ValueError, "retries must be 0 or more, not -1"),
    ({"retries": True}, TypeError, "retries must be a whole number, not True"),
    ({"retries": 1.5}, TypeError, "retries must be a whole number"),
    ({"timeout": 0}, ValueError, "timeout is in seconds and must be more than 0"),
    ({"timeout": float("nan")}, ValueError, "timeout must be finite"),
    ({"timeout": "3"}, TypeError, "timeout must be a number, not '3'"),
    ({"backoff": -1}, ValueError, "backoff is in seconds and must be 0 or more"),
    ({"priority": "high"}, TypeError, "priority must be a number"),
    ({"retry_on": 3}, TypeError, "retry_on takes exception classes, not 3"),
    ({"retry_on": "OSError"}, TypeError, "retry_on takes exception classes, not 'OSError'"),
    ({"retry_on": ["OSError"]}, TypeError, "retry_on takes exception classes, not 'OSError'"),
    ({"lane": "proces"}, ValueError, "no lane 'proces'; did you mean 'process'?"),
    ({"lane": 3}, ValueError, "no lane 3; lanes are process, thread, async, green"),
    ({"lane": "async"}, ValueError, "lane 'async' is for async def, which work is not"),
    ({"limits": ["api"]}, TypeError, "limits takes limits, not 'api'"),
    ({"limits": 3}, TypeError, "limits takes limits, not 3"),
    ({"resources": ["gpu"]}, TypeError, "resources must be a dict"),
    ({"resources": {"memory": "4Q"}}, ValueError, "memory must be a number or a size such as"),
    ({"resources": {"gpu": "4G"}}, ValueError, "gpu must be a number, not '4G'"),
    ({"resources": {"gpu": 1.5}}, ValueError, "gpu must be a whole number or less than 1"),
    ({"resources": {"cpu": -1}}, ValueError, "cpu must be a number, 0 or more, not -1"),
    ({"always": 1}, TypeError, "always must be True or False, not 1"),
    ({"default": "yes"}, TypeError, "default must be True or False"),
    ({"name": ""}, ValueError, "name must be printable"),
    ({"name": "-x"}, ValueError, "name must be printable"),
    ({"name": "a=b"}, ValueError, "without '='"),
    ({"after": "urls"}, TypeError, "after takes tasks, not the name 'urls'"),
    ({"after": [print]}, TypeError, "after takes tasks, not <built-in function print>"),
    ({"label": "{y}"}, ValueError, "there is no parameter 'y'"),
    ({"label": "{inputt.name}"}, ValueError, "did you mean {input}?"),
    ({"label": "{"}, ValueError, "is not a format"),
    ({"label": 3}, TypeError, "label must be a str"),
    ({"retires": 3}, TypeError, "no option 'retires'; did you mean retries?"),
    ({"zzz": 3}, TypeError, "no option 'zzz'; there are name, label,"),
]


@pytest.mark.parametrize(("options", "error", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_an_option_that_cannot_be_is_refused_at_decoration(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    def work(input=1): ...

    with pytest.raises(error) as raised:
        task(**options)(work)
    assert says in str(raised.value)


class Holder:
    def method(self): ...

    @staticmethod
    def static(): ...


NO_FUNCTIONS: list[tuple[Any, str]] = [
    (Holder, "a task is a function; Holder is a class"),
    (Holder.method, "not a method of Holder"),
    (Holder().method, "not a method"),
    (vars(Holder)["static"], "not a method"),
    (urls, "urls is a task already"),
    (3, "a task is a function, not 3; options are given by name"),
    ("fetch", "a task is a function, not 'fetch'"),
]


@pytest.mark.parametrize(("value", "says"), NO_FUNCTIONS)
def test_what_is_no_function_of_a_module_is_refused(value: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        task(value)


def test_a_lambda_needs_a_name() -> None:
    with pytest.raises(ValueError, match="has no name of its own"):
        task(lambda: 1)
    assert task(functools.partial(urls.function, depth=1), name="one")() == ["http://x/0"]


def test_a_default_that_is_a_task_itself_is_refused() -> None:
    def work(pages=urls): ...

    with pytest.raises(TypeError, match=r"write result\(urls\) or each\(urls\)"):
        task(work)


def test_a_positional_only_parameter_cannot_be_filled_by_a_run() -> None:
    def work(page=each([1]), /): ...

    with pytest.raises(TypeError, match="cannot be positional-only: leave out the '/'"):
        task(work)


# -- each, result, per_worker ---------------------------------------------------------


def test_each_of_one_iterable_object_is_one_fan_out_and_of_two_objects_two() -> None:
    numbers = [1, 2, 3]
    assert each(numbers) == each(numbers)
    assert each([1, 2]).identity != each([1, 2]).identity
    assert each(range(3)).items == (0, 1, 2)


def test_each_of_one_iterator_takes_its_items_once() -> None:
    letters = iter("abc")
    assert each(letters) == each(letters)
    assert each(letters).items == ("a", "b", "c")


def test_the_identity_of_an_iterable_is_never_used_again_for_another() -> None:
    assert len({each([number]).identity for number in range(100)}) == 100


def test_a_list_that_grows_between_two_each_is_refused() -> None:
    numbers = [1]
    each(numbers)
    numbers.append(2)
    with pytest.raises(ValueError, match="this list has changed"):
        each(numbers)


NO_ITEMS: list[tuple[Callable[[], Any], str]] = [
    (lambda: each("abc"), "'abc' is one value: write each(['abc'])"),
    (lambda: each(b"abc"), "is one value"),
    (lambda: each(3), "each() takes a task or an iterable of items, not 3"),
    (lambda: each(len), "not <built-in function len>"),
    (lambda: each(urls.function), "not the plain function urls: decorate it with @task"),
    (lambda: each(range(10**12)), "more than 10,000,000 items"),
    (lambda: each([1], flat=True), "flat=True flattens what a task returns"),
    (lambda: each(urls, flat=1), "flat must be True or False"),
    (lambda: each(urls, flat=True), "urls makes a single call, of which each() takes the items"),
    (lambda: each(streamed, flat=True), "streamed is a generator, of which each() takes the"),
    (lambda: result("urls"), "not the name 'urls': pass the task itself"),
    (lambda: result(urls, errors="kep"), "did you mean 'keep'?"),
    (lambda: result(urls, errors=3), "it is 'fail', 'skip' or 'keep'"),
    (lambda: per_worker({}), "takes a function that makes the value, not {}"),
    (lambda: per_worker(urls), "takes a function, and urls is a task"),
]


@pytest.mark.parametrize(("make", "says"), NO_ITEMS, ids=[says for _, says in NO_ITEMS])
def test_a_source_that_cannot_be_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        make()
    assert says in str(raised.value)


def test_an_endless_iterable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskrun.api.MOST_ITEMS", 1000)
    with pytest.raises(ValueError, match="is the iterable endless"):
        each(itertools.count())


def test_a_value_per_worker_that_is_never_yielded_is_an_error_that_says_where() -> None:
    def empty():
        yield from ()

    @task
    def use(it=per_worker(empty)): ...

    with pytest.raises(ArgumentError, match=r"per_worker\(empty\) yielded nothing.*test_api.py:"):
        use()


def test_an_async_function_cannot_make_a_value_per_worker() -> None:
    async def connect(): ...

    with pytest.raises(TypeError, match="not async def"):
        per_worker(connect)


# -- the package ----------------------------------------------------------------------


def test_importing_taskrun_imports_nothing_else_of_it() -> None:
    code = "import sys, taskrun; print([m for m in sys.modules if m.startswith('taskrun.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "['taskrun.hooks']\n"


def test_the_package_lists_its_names_and_knows_no_others() -> None:
    assert set(taskrun.__all__) <= set(dir(taskrun))
    with pytest.raises(AttributeError, match="has no attribute 'tsk'"):
        taskrun.tsk  # noqa: B018


def test_what_is_made_per_worker_may_be_made_by_a_task_that_needs_such_a_thing_itself() -> None:
    def outer() -> str:
        return inner_task() + " outside"

    @task
    def inner_task(name: str = per_worker(lambda: "inside")) -> str:
        return name

    @task
    def outer_task(name: str = per_worker(outer)) -> str:
        return name

    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(outer_task()), daemon=True)
    thread.start()
    thread.join(20)
    assert found == ["inside outside"]
