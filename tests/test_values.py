"""Values, arguments and failures survive the way to another process, or say why not."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from enum import Enum, IntEnum
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from taskrun import errors, failures
from taskrun.context import Future
from taskrun.model import Failure
from taskrun.values import (
    decode,
    decode_failure,
    dumps_arguments,
    encode,
    encode_failure,
    encode_items,
    loads_arguments,
)

pytestmark = pytest.mark.timeout(60)


class Colour(Enum):
    RED = 1


class Size(IntEnum):
    BIG = 3


@dataclasses.dataclass
class Page:
    url: str
    links: list[Any]


# -- values ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, True, False, 0, -1, 2**63 - 1, -(2**63), 1.5, float("inf"), "", "é" * 256]
)
def test_scalars_travel_as_themselves(value: Any) -> None:
    assert encode(value) == (value, ())
    assert encode(value)[0] is value


@pytest.mark.parametrize(
    "value",
    [2**63, 10**500, "x" * 257, b"", b"raw", bytearray(b"x"), (), [1], {"a": {2}}, 1 + 2j, ...,
     Colour.RED, Size.BIG, Path("/tmp"), Page("u", [1]), OrderedDict(a=1), Failure("a", "b", "c"),
     "\ud800" * 300, int, len, ValueError],
)  # fmt: skip
def test_all_else_travels_as_a_pickle_and_comes_back_equal(value: Any) -> None:
    payload, keys = encode(value)
    assert type(payload) is bytes and keys == ()
    assert decode(payload) == value
    assert type(decode(payload)) is type(value)


def test_lambdas_local_classes_and_closures_travel_by_value() -> None:
    @dataclasses.dataclass
    class Local:
        n: int

    factor = 3
    assert decode(encode(lambda n: n * factor)[0])(5) == 15
    assert decode(encode([Local(4)])[0])[0].n == 4


def test_objects_of_main_travel_by_value() -> None:
    script = """
from taskrun.values import encode, dumps_arguments, encode_failure
class Point:
    def __init__(self, x): self.x = x
class Bad(Exception): pass
def double(n): return 2 * n
def fail(): raise Bad("no")
try: fail()
except Bad as error: failure = encode_failure(error)
import pickle, sys
sys.stdout.buffer.write(pickle.dumps(
    (encode(Point(7))[0], dumps_arguments((double,), {"p": Point(1)})[0], failure)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    value, arguments, failure = pickle.loads(done.stdout)
    assert decode(value).x == 7
    (double,), kwargs = loads_arguments(arguments, {})
    assert double(4) == 8 and kwargs["p"].x == 1
    error = decode_failure(failure)
    assert failure.type_name == type(error).__name__ == "Bad"
    assert traceback.extract_tb(error.__traceback__)[-1].name == "fail"


def test_a_list_of_encoded_values_decodes_to_a_list_with_exceptions_in_place() -> None:
    failure = encode_failure(ValueError("bad"))
    first, second, third, fourth = decode([1, encode([2])[0], failure, None])
    assert (first, second, fourth) == (1, [2], None)
    assert isinstance(third, ValueError) and third.args == ("bad",)


def test_what_cannot_be_pickled_is_a_named_error_that_says_where_it_is() -> None:
    lock = threading.Lock()
    with pytest.raises(errors.ResultError, match=r"a dict .* of its \['rows'\]\[1\]\.links\[0\]: "):
        encode({"rows": [1, Page("u", [lock])]})
    with pytest.raises(errors.ResultError, match=r"a _thread\.lock cannot be pickled: TypeE"):
        encode(lock)
    with pytest.raises(errors.ArgumentError, match=r"argument 2\[0\] cannot be pickled: TypeErr"):
        dumps_arguments((1, [lock]), {})
    with pytest.raises(errors.ArgumentError, match="argument page= cannot be pickled: TypeErr"):
        dumps_arguments((1,), {"page": lock})


def test_a_value_nested_too_deeply_is_an_error_and_no_crash() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(errors.ResultError, match="a list cannot be pickled"):
        encode(deep)
    while deep:
        deep = deep.pop()  # freed step by step


def test_an_error_in_a_getstate_of_the_user_is_the_cause() -> None:
    class Sly:
        def __reduce__(self) -> Any:
            raise KeyError("sly")

    with pytest.raises(errors.ResultError, match="KeyError: 'sly'") as caught:
        encode([Sly()])
    assert isinstance(caught.value.__cause__, KeyError)


# -- items ----------------------------------------------------------------------------


def test_items_are_encoded_one_by_one_and_iterators_are_consumed() -> None:
    assert encode_items(range(3)) == [(0, ()), (1, ()), (2, ())]
    assert encode_items({"a": 1, "b": 2}) == [("a", ()), ("b", ())]
    assert encode_items(character for character in "xy") == [("x", ()), ("y", ())]
    assert encode_items([]) == []
    future = Future("work", b"k1")
    assert encode_items([future, 1]) == [(None, (b"k1",)), (1, ())]


@pytest.mark.parametrize("value", ["text", b"x", bytearray(b"x"), 3, None, object()])
def test_a_value_without_items_is_an_error_that_says_what_to_return(value: Any) -> None:
    with pytest.raises(errors.ResultError, match=rf"{type(value).__name__}.*: return a list"):
        encode_items(value)


def test_a_value_whose_items_never_end_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("taskrun.values.MOST_ITEMS", 1000)
    assert len(encode_items(range(1000))) == 1000
    with pytest.raises(errors.ResultError, match="count, has more than 1,000; is it endless"):
        encode_items(count())


def test_a_future_has_no_items_yet() -> None:
    with pytest.raises(errors.ResultError, match="return a list of futures"):
        encode_items(Future("work", b"k"))


def test_what_an_iteration_raises_is_the_users_own_error() -> None:
    def pages() -> Iterator[int]:
        yield 1
        raise LookupError("page 2")

    with pytest.raises(LookupError, match="page 2"):
        encode_items(pages())


# -- futures --------------------------------------------------------------------------


def test_a_future_itself_differs_from_none_by_its_key() -> None:
    assert encode(Future("work", b"k")) == (None, (b"k",))
    assert encode(None) == (None, ())
    assert decode((None, {b"k": None})) is None
    assert decode((None, {b"k": encode([1])[0]})) == [1]


def test_futures_at_any_depth_are_collected_and_replaced_by_values() -> None:
    one, two = Future("work", b"k1"), Future("work", b"k2")
    payload, keys = encode({"all": [one, (two, {"again": one})], "page": Page("u", [two])})
    assert sorted(keys) == [b"k1", b"k2"]
    value = decode((payload, {b"k1": 1, b"k2": encode([2])[0]}))
    assert value == {"all": [1, ([2], {"again": 1})], "page": Page("u", [[2]])}


def test_equal_futures_count_once_and_share_their_value() -> None:
    payload, keys = encode([Future("work", b"k"), Future("work", b"k")])
    assert keys == (b"k",)
    first, second = decode((payload, {b"k": encode([])[0]}))
    assert first is second


def test_futures_beside_a_lambda_are_collected_once() -> None:
    payload, keys = encode([Future("work", b"k"), lambda: 5])
    assert keys == (b"k",)
    value, function = decode((payload, {b"k": "v"}))
    assert (value, function()) == ("v", 5)


def test_linked_values_may_be_linked_in_turn() -> None:
    inner = encode([Future("work", b"x")])[0]
    outer = encode((Future("work", b"x"), 1))[0]
    assert decode((outer, {b"x": (inner, {b"x": 9})})) == ([9], 1)
    chain: Any = 42
    for _ in range(50_000):
        chain = (None, {b"k": chain})
    assert decode(chain) == 42
    while type(chain) is tuple:
        chain = chain[1].pop(b"k")  # freed step by step


def test_arguments_keep_their_futures() -> None:
    future = Future("work", b"k")
    blob, keys = dumps_arguments((1, [future]), {"page": future, "n": 2})
    assert keys == (b"k",)
    assert loads_arguments(blob, {b"k": "v"}) == ((1, ["v"]), {"page": "v", "n": 2})
    assert loads_arguments(dumps_arguments((), {})[0], {}) == ((), {})


def test_a_future_is_not_pickled_by_others() -> None:
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"pass it as an argument of submit\(\) or return it"):
            attempt(Future("work", b"k"))
    with pytest.raises(errors.ResultError, match="a Future cannot be pickled"):
        encode(Future("work"))  # made outside a run: nobody knows it
    payload, _ = encode([Future("work", b"k")])
    with pytest.raises(TypeError, match="by taskrun only"):
        pickle.loads(payload)


def test_encoding_inside_encoding_keeps_the_futures_apart() -> None:
    inner: list[Any] = []

    class Nested:
        def __reduce__(self) -> Any:
            inner.append(encode([Future("work", b"inner")])[1])
            return list, ()

    assert encode([Nested(), Future("work", b"outer")])[1] == (b"outer",)
    assert set(inner) == {(b"inner",)}


# -- failures -------------------------------------------------------------------------


def caught(raising: Any, *args: Any) -> BaseException:
    try:
        raising(*args)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def raised(error: BaseException) -> BaseException:
    def the_line_that_raises() -> None:
        raise error

    return caught(the_line_that_raises)


def rebuilt(error: BaseException) -> BaseException:
    """``error`` after the journey, which must not have reduced it to text."""
    failure = encode_failure(error)
    assert failure.pickled is not None
    return decode_failure(pickle.loads(pickle.dumps(failure)))


class TwoArguments(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")
        self.code = code


class KeywordOnly(ValueError):
    def __init__(self, *, path: str) -> None:
        self.path = path


class OwnNew(Exception):
    def __new__(cls, code: int) -> OwnNew:
        made = super().__new__(cls, "text")
        made.code = code  # type: ignore[attr-defined]
        return made


class BadFile(OSError):
    def __init__(self, path: str, hint: str) -> None:
        super().__init__(2, "No such file", path)
        self.hint = hint


class WithSlots(Exception):
    __slots__ = ("row",)


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Group(ExceptionGroup[Exception]):
    def __new__(cls, found: list[Exception], status: int) -> Group:
        made = super().__new__(cls, f"status {status}", found)
        made.status = status  # type: ignore[attr-defined]
        return made

    def derive(self, found: Any) -> Group:
        return Group(found, self.status)  # type: ignore[attr-defined]


class Reduced(Exception):
    def __init__(self, number: int, *, unit: str) -> None:
        super().__init__(f"{number} {unit}")
        self.number, self.unit = number, unit

    def __reduce__(self) -> Any:
        return _reduced, (self.number, self.unit)


def _reduced(number: int, unit: str) -> Reduced:
    return Reduced(number, unit=unit)


class CannotRebuild(Exception):
    def __reduce__(self) -> Any:
        return int, ("not a number",)


class RebuildsToAnother(Exception):
    def __reduce__(self) -> Any:
        return ValueError, ("other",)


class Hostile(Exception):
    def __str__(self) -> str:
        sys.exit("str")

    __repr__ = __str__

    def __reduce__(self) -> Any:
        sys.exit("reduce")


def examples() -> list[BaseException]:
    found: list[BaseException] = [
        ValueError("bad", 3), KeyError("k"), TwoArguments(4, "no"), KeywordOnly(path="p"),
        OwnNew(7), BadFile("/x", "look"), Frozen(5), Reduced(3, unit="m"), StopIteration(4),
        SystemExit(3), KeyboardInterrupt(), ImportError("no", name="n", path="p"),
        caught(open, "/no/such/file"), caught(b"\xff".decode), caught("\udc00".encode),
        caught(compile, "a b", "f.py", "exec"), caught(lambda: [].nope),  # type: ignore[attr-defined]
        caught(eval, "nope"), subprocess.CalledProcessError(2, "cmd", "out", stderr="err"),
        errors.Retry("later", after=5), errors.RemoteError("m", "T", "text"),
        errors.CallTimeout("10 s"), errors.RunFailed("m", (1,)), BlockingIOError(11, "b", 5),
        Group([ValueError("in")], 3), ExceptionGroup("g", [ValueError("in")]),
        BaseExceptionGroup("b", [KeyboardInterrupt()]),
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("original", examples(), ids=lambda error: type(error).__name__)
def test_exceptions_of_all_kinds_are_rebuilt_whole(original: BaseException) -> None:
    error = rebuilt(raised(original))
    assert type(error) is type(original)
    assert str(error) == str(original)
    assert repr(error) == repr(original)
    shown = {name: repr(value) for name, value in vars(error).items()}
    assert shown == {name: repr(value) for name, value in vars(original).items()}
    frames = traceback.extract_tb(error.__traceback__)
    assert [(frame.name, frame.lineno) for frame in frames] == [
        (frame.name, frame.lineno) for frame in traceback.extract_tb(original.__traceback__)
    ]


def test_what_c_code_and_slots_keep_is_rebuilt_too() -> None:
    slotted = WithSlots("bad")
    slotted.row = 3  # type: ignore[attr-defined]
    assert rebuilt(slotted).row == 3  # type: ignore[attr-defined]
    assert rebuilt(caught(eval, "nope")).name == "nope"  # type: ignore[attr-defined]
    missing = rebuilt(caught(open, "/no/such/file"))
    assert isinstance(missing, FileNotFoundError)
    assert (missing.errno, missing.filename) == (2, "/no/such/file")
    syntax = rebuilt(caught(compile, "a b", "f.py", "exec"))
    assert isinstance(syntax, SyntaxError) and (syntax.filename, syntax.lineno) == ("f.py", 1)
    undecoded = rebuilt(caught(b"ab\xff".decode))
    assert isinstance(undecoded, UnicodeDecodeError) and undecoded.object == b"ab\xff"


def chained() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            error.add_note("a note")
            raise TwoArguments(1, "second") from error
    except TwoArguments:
        raise ValueError("third")  # noqa: B904


def test_cause_context_and_notes_are_rebuilt_with_their_tracebacks() -> None:
    original = caught(chained)
    error = rebuilt(original)
    second = error.__context__
    assert isinstance(second, TwoArguments) and error.__cause__ is None
    assert not error.__suppress_context__
    first = second.__cause__
    assert isinstance(first, KeyError) and second.__context__ is first
    assert second.__suppress_context__ and first.__notes__ == ["a note"]
    for one in (error, second, first):
        assert traceback.extract_tb(one.__traceback__)[-1].name == "chained"
    text = encode_failure(original).traceback
    assert text == "".join(traceback.format_exception(original))


def test_from_none_stays_suppressed() -> None:
    def suppressed() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second") from None

    error = rebuilt(caught(suppressed))
    assert error.__suppress_context__ and isinstance(error.__context__, KeyError)
    assert "KeyError" not in encode_failure(caught(suppressed)).traceback


def test_groups_are_rebuilt_with_what_is_in_them() -> None:
    inner = ExceptionGroup("inner", [raised(TwoArguments(1, "deep")), raised(OSError(2, "os"))])  # type: ignore[list-item]
    original = raised(Group([inner, caught(chained)], 9))  # type: ignore[list-item]
    error = rebuilt(original)
    assert isinstance(error, Group) and error.status == 9  # type: ignore[attr-defined]
    found, third = error.exceptions
    assert isinstance(found, ExceptionGroup) and isinstance(found.exceptions[0], TwoArguments)
    assert found.exceptions[0].__traceback__ is not None
    assert isinstance(third.__context__, TwoArguments)
    assert error.subgroup(OSError) is not None
    assert "TwoArguments: deep (1)" in encode_failure(original).traceback


def test_a_chain_that_bites_its_tail_is_rebuilt() -> None:
    one, two = ValueError("one"), KeyError("two")
    one.__cause__, two.__cause__ = two, one
    error = rebuilt(one)
    assert isinstance(error.__cause__, KeyError)
    assert error.__cause__.__cause__ is error


def test_a_chain_of_ten_thousand_is_cut_and_quick() -> None:
    last: BaseException = ValueError("innermost")
    for number in range(10_000):
        outer = raised(KeyError(number))
        outer.__context__ = last
        last = outer
    failure = encode_failure(last)
    error: BaseException | None = decode_failure(failure)
    length = 0
    while error is not None:
        error, length = error.__context__, length + 1
    assert failures.CHAIN_LIMIT <= length <= failures.CHAIN_LIMIT + 2
    assert failure.traceback.endswith("KeyError: 9999\n\n")
    while last.__context__ is not None:
        last.__context__, last = None, last.__context__


def test_groups_nested_very_deeply_become_text() -> None:
    group: Exception = ValueError("innermost")
    for number in range(5_000):
        group = ExceptionGroup(f"level {number}", [group])
    failure = encode_failure(group)
    assert failure.message == "level 4999 (1 sub-exception)"
    assert "ExceptionGroup: level 4999 (1 sub-exception)" in failure.traceback
    assert isinstance(decode_failure(failure), ExceptionGroup | errors.RemoteError)


def test_a_recursion_error_keeps_both_ends_of_its_traceback() -> None:
    def forever() -> None:
        forever()

    original = caught(forever)
    error = rebuilt(original)
    assert isinstance(error, RecursionError)
    frames = traceback.extract_tb(error.__traceback__)
    assert len(frames) == failures.FRAME_LIMIT and frames[0].name == "caught"
    assert "Previous line repeated" in encode_failure(original).traceback


@pytest.mark.parametrize("cls", [CannotRebuild, RebuildsToAnother, Hostile])
def test_what_cannot_be_rebuilt_becomes_a_remote_error_with_the_text(cls: Any) -> None:
    failure = encode_failure(raised(cls("the message")))
    assert failure.pickled is None
    error = decode_failure(failure)
    assert isinstance(error, errors.RemoteError)
    assert error.type_name.endswith(cls.__name__)
    assert "the_line_that_raises" in error.traceback_text
    assert "the_line_that_raises" in error.__notes__[0]
    if cls is Hostile:
        assert failure.message == "<str() of this Hostile raised SystemExit>"
    else:
        assert str(error) == f"{failure.type_name}: the message"


def test_an_attribute_that_cannot_be_pickled_becomes_text() -> None:
    original = ValueError("bad")
    original.lock = threading.Lock()  # type: ignore[attr-defined]
    assert isinstance(decode_failure(encode_failure(original)), errors.RemoteError)


def test_a_cause_that_cannot_be_pickled_costs_the_chain_only() -> None:
    original = raised(ValueError("bad"))
    original.__cause__ = CannotRebuild("deep down")
    error = rebuilt(original)
    assert type(error) is ValueError and error.__cause__ is None
    assert "CannotRebuild: deep down" in encode_failure(original).traceback


def test_local_exception_classes_travel_by_value() -> None:
    class Local(Exception):
        def __init__(self, *, code: int) -> None:
            self.code = code

    failure = encode_failure(raised(Local(code=3)))
    script = (
        "import pickle, sys; from taskrun.values import decode_failure;"
        "error = decode_failure(pickle.load(sys.stdin.buffer));"
        "print(type(error).__name__, error.code, error.__traceback__ is not None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(failure), capture_output=True
    )
    assert done.stdout.decode() == "Local 3 True\n", done.stderr.decode()


def test_a_class_that_is_not_there_where_it_is_rebuilt_becomes_text() -> None:
    failure = encode_failure(raised(TwoArguments(1, "no")))
    assert failure.pickled is not None
    elsewhere = dataclasses.replace(
        failure, pickled=failure.pickled.replace(b"TwoArguments", b"NoArguments!")
    )
    error = decode_failure(elsewhere)
    assert isinstance(error, errors.RemoteError)
    assert "could not be rebuilt" in error.__notes__[-1]


def test_long_texts_keep_head_and_tail() -> None:
    failure = encode_failure(raised(ValueError("a" + "x" * 1_000_000 + "z")))
    assert len(failure.message) < failures.MESSAGE_LIMIT + 100
    assert len(failure.traceback) < failures.TRACEBACK_LIMIT + 100
    assert failure.message.startswith("ax") and failure.message.endswith("xz")
    assert failure.traceback.startswith("Traceback") and failure.traceback.endswith("xz\n")


def test_texts_are_plain_strings_that_anyone_can_unpickle() -> None:
    class Markup(str):
        __slots__ = ()

    class Marked(Exception):
        def __str__(self) -> str:
            return Markup("marked")

    failure = encode_failure(Marked())
    assert type(failure.message) is str and failure.message == "marked"


def test_our_own_frames_are_left_out() -> None:
    original = caught(encode, threading.Lock())
    assert "taskrun/values.py" not in encode_failure(original).traceback
    own = caught(encode, threading.Lock())
    own.__traceback__ = own.__traceback__ and own.__traceback__.tb_next  # as a worker sees it
    failure = encode_failure(own)
    assert "taskrun/values.py" not in failure.traceback
    assert "cloudpickle" not in failure.traceback
    assert failure.type_name == "ResultError"
    assert rebuilt(own).__traceback__ is None


def test_our_own_frames_between_those_of_a_user_are_left_out() -> None:
    def raised_here() -> None:
        raise ValueError("inner")

    def asked() -> None:
        decoded = decode_failure(encode_failure(caught(raised_here)))
        future = Future("child")
        future.fail(decoded)
        future.result()

    failure = encode_failure(caught(asked))
    names = [frame.name for frame in traceback.extract_tb(decode_failure(failure).__traceback__)]
    assert names == ["caught", "asked", "caught", "raised_here"]
    assert "taskrun/context.py" not in failure.traceback


def test_a_rebuilt_traceback_shows_the_source_without_misplaced_carets() -> None:
    shown = traceback.format_exception(rebuilt(raised(ValueError("bad"))))
    assert "    raise error\n" in "".join(shown)
    assert "^" not in "".join(shown)


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("lost", errors.WorkerLost),
        ("timeout", errors.CallTimeout),
        ("cancelled", errors.CallCancelled),
        ("skipped", errors.CallSkipped),
        ("blocked", errors.CallBlocked),
        ("error", errors.RemoteError),
    ],
)
def test_a_failure_without_a_pickle_becomes_the_error_of_its_kind(kind: str, cls: Any) -> None:
    error = decode(Failure(kind, "SomeError", "what happened"))
    assert type(error) is cls and "what happened" in str(error)


def test_a_message_can_be_given() -> None:
    failure = encode_failure(ValueError("x"), "timeout", message="longer than 3 s")
    assert (failure.kind, failure.message) == ("timeout", "longer than 3 s")
    assert failure.headline == "ValueError: longer than 3 s"


def test_an_interrupt_travels_as_the_error_of_its_kind() -> None:
    failure = encode_failure(raised(errors.Interrupted("longer than 3 s")), "timeout")
    assert failure.headline == "CallTimeout: longer than 3 s"
    assert type(decode_failure(failure)) is errors.CallTimeout
