"""``--engine``: what it may say, and the engine that is meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from taskrun.errors import UsageError
from taskrun.model import nearest

if TYPE_CHECKING:
    from taskrun.engines.foreign import ForeignEngine
    from taskrun.engines.hosts import Host
    from taskrun.network.bundles import Bundle

NAMES: Final = ("dask", "ray", "fake")
SCHEMES: Final = ("dask", "tls", "ray")


def check(text: str) -> str:
    """``text``, if it can name an engine; nothing is imported.  Raises UsageError."""
    scheme, separator, rest = text.partition("://")
    if separator:
        if scheme not in SCHEMES:
            raise UsageError(f"--engine {text}: {_near(scheme, SCHEMES)}; {_forms()}")
        if not rest:
            raise UsageError(f"--engine {text}: the address is missing: {scheme}://HOST:PORT")
        return text
    module, colon, factory = text.partition(":")
    if text not in NAMES and not (colon and module and factory):
        raise UsageError(f"--engine {text}: {_near(text, NAMES)}; {_forms()}")
    return text


def _near(text: str, names: tuple[str, ...]) -> str:
    near = nearest(text, names)
    return f"did you mean {near}?" if near else "there is no such engine"


def _forms() -> str:
    return "it is dask, dask://HOST:PORT, tls://HOST:PORT, ray, ray://HOST:PORT or MODULE:FACTORY"


def make_engine(
    text: str,
    *,
    jobs: int,
    module: str | None,
    file: str | None,
    grace: float,
    recipe_ids: Iterator[int],
    constants: Mapping[str, dict[str, Any]],
    state: Callable[[], tuple[tuple[Any, ...], bytes]],
    bundle: Callable[[], Bundle | None],
) -> ForeignEngine:
    """The engine that ``text`` names.  Raises UsageError where it, or what it needs, is not
    there."""
    host = _host(check(text), jobs)
    from taskrun.engines.foreign import ForeignEngine

    return ForeignEngine(
        host,
        module=module,
        file=file,
        grace=grace,
        recipe_ids=recipe_ids,
        constants=constants,
        state=state,
        bundle=bundle,
    )


def _host(text: str, jobs: int) -> Host:
    scheme, separator, _ = text.partition("://")
    if scheme == "fake":
        from taskrun.engines.fake import FakeHost

        return FakeHost(jobs)
    if scheme in ("dask", "tls") and (separator or scheme == "dask"):
        _need("distributed", text, "dask")
        from taskrun.engines.dask import DaskHost

        return DaskHost(text, jobs)
    if scheme == "ray":
        _need("ray", text, "ray")
        from taskrun.engines.ray import RayHost

        return RayHost(text, jobs)
    from taskrun.engines.executor import executor_host

    return executor_host(text, jobs)


def _need(package: str, text: str, extra: str) -> None:
    from importlib.util import find_spec  # only an engine is looked for

    if find_spec(package) is None:
        raise UsageError(
            f"--engine {text} needs a package that is not installed: pip install 'taskrun[{extra}]'"
        )
