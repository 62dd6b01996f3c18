"""Options and arguments that several commands share, and what they mean."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from taskrun.cli.split import split_words
from taskrun.errors import UsageError
from taskrun.loading import Loaded, check_file, find_file, load
from taskrun.settings import cores_here

if TYPE_CHECKING:
    from taskrun.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])
CONTEXT: dict[str, Any] = {"auto_envvar_prefix": "TASKRUN", "max_content_width": 80}
"""Settings of every command: ``TASKRUN_JOBS``, not ``TASKRUN_EXEC_JOBS``."""
A_FILE = click.Path(readable=False)
"""A file that shells complete; what is wrong with it is said by who reads it."""


# -- how a run is to go ---------------------------------------------------------------


class Seconds(click.FloatRange):
    """A number of seconds.  A range alone lets nan pass, which is in none, and inf."""

    name = "number of seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds


def check_jobs(
    context: click.Context, parameter: click.Parameter, jobs: int | None, *, instead: str = ""
) -> int:
    """How many workers; as many as cores, where nothing is said.  Where 0 would leave nobody to
    do the work, ``instead`` says what to say; that it does not where others may come."""
    if jobs is None:
        return cores_here()
    if jobs < 0:
        raise UsageError(f"-j is a number of workers, {1 if instead else 0} or more, not {jobs}")
    if jobs == 0 and instead and not context.params.get("listen"):
        raise UsageError(f"-j 0 leaves nobody to do the work; {instead}")
    return jobs


def check_resources(
    context: click.Context, parameter: click.Parameter, texts: Sequence[str]
) -> dict[str, float]:
    """Name -> amount."""
    resources = {}
    for text in texts:
        name, equals, much = text.partition("=")
        if not (name and equals):
            raise UsageError(f"--resource takes NAME=AMOUNT such as gpu=2, not {text!r}")
        from taskrun.parameters import capacity  # few need it

        resources[name] = capacity(name, much, f"--resource {text}")
    return resources


def _check_lane_jobs(
    context: click.Context, parameter: click.Parameter, texts: Sequence[str]
) -> dict[str, int]:
    jobs = {}
    for text in texts:
        from taskrun.lanes import check_has_workers  # few need it

        lane, _, much = text.partition("=")
        check_has_workers(lane, f"--lane-jobs {text}")
        if not much.isdecimal() or int(much) < 1:
            raise UsageError(f"--lane-jobs takes LANE=N, such as async=2, not {text!r}")
        jobs[lane] = int(much)
    return jobs


def _check_joblog(
    context: click.Context, parameter: click.Parameter, path: str | None
) -> str | None:
    if path is not None:
        folder = os.path.dirname(path) or os.curdir
        if not os.path.isdir(folder):
            raise UsageError(f"--joblog {path}: there is no folder {folder}")
    return path


_TLS_OPTIONS = (  # for few, and the help has to fit one screen
    click.option(
        "--tls-cert", type=A_FILE, metavar="F", help="A certificate to show.", hidden=True
    ),
    click.option("--tls-key", type=A_FILE, metavar="F", help="Its key.", hidden=True),
    click.option("--tls-ca", type=A_FILE, metavar="F", help="Who signed the others'.", hidden=True),
)


def tls_options(command: Command) -> Command:
    """The options for certificates of one's own: ``tls_cert``, ``tls_key``, ``tls_ca``."""
    for option in reversed(_TLS_OPTIONS):
        command = option(command)
    return command


def dialling_options(command: Command) -> Command:
    """The options of who dials: those of :func:`tls_options`, and ``insecure_plain``."""
    plain = click.option(
        "--insecure-plain", is_flag=True, help="Without TLS, read by anyone.", hidden=True
    )
    return tls_options(plain(command))


def _check_engine(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> str | None:
    if text is None:
        return None
    from taskrun.engines.choosing import check

    return check(text)


_OPTIONS = (
    click.option(
        "-j", "--jobs", type=int, metavar="N",
        callback=partial(check_jobs, instead="say -j 1 or more, or --listen for nodes"),
        help="How many workers. [default: the cores]",
    ),
    click.option(
        "--lane-jobs", multiple=True, metavar="LANE=N", envvar="TASKRUN_LANE_JOBS",
        callback=_check_lane_jobs, help="How many workers a lane may have: async=2.",
    ),
    click.option("-k", "--keep-going", is_flag=True, help="Go on after a failure."),
    click.option("--fail-fast", is_flag=True, help="On a failure end what runs, too."),
    click.option("--inline", is_flag=True, help="Run every call in this process, uncaptured."),
    click.option(
        "--resource", "resources", multiple=True, metavar="NAME=AMOUNT", envvar="TASKRUN_RESOURCE",
        callback=check_resources, help="What this machine has: gpu=2.",
    ),
    click.option(
        "--output", type=click.Choice(["line", "group", "raw", "quiet"]), default="line",
        metavar="HOW", help="line, group, raw or quiet. [default: line]",
    ),
    click.option("--json", "json", is_flag=True, help="Write events as JSON lines on stdout."),
    click.option(
        "--joblog", type=click.Path(dir_okay=False, writable=True), metavar="F",
        callback=_check_joblog, help="Write a line per attempt to file F.",
    ),
    click.option(
        "--start-method", type=click.Choice(["forkserver", "spawn"]), default="forkserver",
        metavar="HOW", help="forkserver or spawn. [default: forkserver]",
    ),
    click.option(
        "--state", type=click.Path(dir_okay=False), metavar="F",
        help="Load shared state from file F, and keep it there.",
    ),
    click.option(
        "--listen", metavar="ADDRESS", is_eager=True, help="Let others join: HOST:PORT.",
    ),
    click.option(
        "--engine", metavar="E", callback=_check_engine,
        help="Where calls run instead: dask, ray, ...",
    ),
    click.option(
        "--lease", type=Seconds(min=0.5), default=15.0, metavar="SECONDS", hidden=True,
        help="How long a node may be silent. [default: 15]",
    ),
    click.option(
        "--bundle", multiple=True, metavar="GLOB", hidden=True,
        help="Data files beside the task file that other machines need.",
    ),
    click.option("--authkey-file", type=A_FILE, metavar="F", help="Where the key of clients is."),
    *_TLS_OPTIONS,
    click.option(
        "--insecure-plain", is_flag=True, help="--listen without TLS, read by anyone.", hidden=True,
    ),
)  # fmt: skip


def run_options(command: Command) -> Command:
    """The options of every command that runs calls; see :func:`settings_from`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_NODES = ("listen", "address")
_NEED = {
    "tls_cert": _NODES, "tls_key": _NODES, "tls_ca": _NODES, "insecure_plain": _NODES,
    "lease": _NODES, "bundle": (*_NODES, "engine"),
}  # fmt: skip
"""What does nothing without any of these."""


def check_needed(context: click.Context) -> None:
    """Raises UsageError for an option that is typed and, without another one, would do nothing:
    who names certificates believes that they are used.  What the environment says is for
    all commands, and for those that have no use for it as well."""
    for name, others in _NEED.items():
        known = [other for other in others if other in context.params]
        if not is_typed(context, name) or any(context.params[other] for other in known):
            continue
        flags = _either([_flag(other) for other in known])
        raise UsageError(f"{_flag(name)} does nothing without {flags}: say that too, or leave it "
                         "out")  # fmt: skip
    listen = context.params.get("listen")
    if listen:
        check_certificates(context, listen)


def check_certificates(context: click.Context, address: str | None) -> None:
    """Raises UsageError where certificates are typed for an address at which there is no TLS."""
    typed = [name for name in ("tls_cert", "tls_key", "tls_ca") if is_typed(context, name)]
    if not typed:
        return
    from taskrun import addresses

    plain = bool(context.params.get("insecure_plain"))
    if address:
        found = addresses.parse(address, insecure_plain=plain, to_listen=True)  # or to dial
    else:
        found = addresses.find(insecure_plain=plain)
    if isinstance(found, addresses.Tls):
        return
    shown = addresses.shown(found)
    what = f"say tls://{shown}" if isinstance(found, tuple) else "leave it out"
    if plain:
        what = "leave out --insecure-plain"
    raise UsageError(f"{_flag(typed[0])} is for TLS, and at {shown} there is none: {what}")


def is_typed(context: click.Context, name: str) -> bool:
    """Whether an option is said on the command line, not by the environment."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _either(flags: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(flags[:-1]), flags[-1])))


def settings_from(context: click.Context, options: dict[str, Any]) -> Settings:
    """The Settings that the options of :func:`run_options` ask for."""
    exclude(context, options, "keep_going", "fail_fast")
    exclude(context, options, "inline", "engine")
    if not options["jobs"] and (options["inline"] or options["engine"]):
        where = "--inline" if options["inline"] else f"--engine {options['engine']}"
        raise UsageError(f"-j 0 leaves the work to nodes, and with {where} there are none; say "
                         "-j 1 or more")  # fmt: skip
    keep_going, fail_fast = options.pop("keep_going"), options.pop("fail_fast")
    policy = "keep-going" if keep_going else "fail-fast" if fail_fast else "stop"
    from taskrun.settings import Settings

    return Settings(policy=policy, borrows=bool(context.obj), **options)


def exclude(context: click.Context, options: dict[str, Any], *names: str) -> None:
    """Of two options that exclude each other, what is typed counts before what the
    environment says."""
    if not all(options[name] for name in names):
        return
    typed = [name for name in names if is_typed(context, name)]
    if len(typed) != 1:
        flags = " and ".join(map(_flag, names))
        raise UsageError(f"{flags} exclude each other")
    for name in set(names).difference(typed):
        options[name] = False if options[name] is True else None


def stdout_for_events(context: click.Context, options: dict[str, Any]) -> int | None:
    """With ``--json`` a descriptor of stdout, as of :func:`reserved_stdout`; else None."""
    return reserved_stdout(context) if options["json"] else None


def reserved_stdout(context: click.Context) -> int:
    """A descriptor of stdout, taken before the task file, or anything else, can write there."""
    from taskrun.reporting import terminal

    return context.with_resource(terminal.reserved_stdout())


# -- which file, which tasks ----------------------------------------------------------


def complete_words(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[Any]:
    from taskrun.cli.words import words_for  # only when TAB is pressed

    return words_for(context.params.get(parameter.name or "") or (), incomplete)


def complete_file(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """A single FILE, for :func:`words_argument`."""
    from taskrun.cli.words import a_file

    return [] if context.params.get(parameter.name or "") else a_file(incomplete)


def words_argument(
    metavar: str, complete: Callable[..., list[Any]] = complete_words
) -> Callable[[Command], Command]:
    """The argument ``[FILE] [TASK]...``, for :func:`split_words`."""
    return click.argument("words", nargs=-1, metavar=metavar, shell_complete=complete)


def load_words(words: Sequence[str]) -> tuple[Loaded, list[str]]:
    """The tasks of FILE, or of the nearest tasks.py, and the names of those that are meant."""
    file, targets = split_words(words)
    if file is not None:
        return load(file), targets
    first = targets[0] if targets else ""
    try:
        found = find_file(meant=first)
    except UsageError:
        if os.path.exists(first):
            check_file(first)
        raise
    loaded = load(found)
    if first and first not in loaded.tasks and _names_a_file(first):
        check_file(first)  # that was meant, and this says what is wrong with it
    return loaded, targets


def _names_a_file(word: str) -> bool:
    return os.path.exists(word) or os.path.isfile(f"{word}.py")
