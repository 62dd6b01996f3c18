"""``taskrun exec``: run the tasks of a file."""

from __future__ import annotations

import gc
from typing import Any

import click

from taskrun.cli.options import (
    CONTEXT,
    check_certificates,
    check_needed,
    load_words,
    run_options,
    settings_from,
    stdout_for_events,
    words_argument,
)
from taskrun.errors import UsageError
from taskrun.lanes import check_lanes
from taskrun.model import Plan
from taskrun.planning import estimate, make_plan, needs_flags
from taskrun.reporting import text


def _complete_param(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[Any]:
    from taskrun.cli.words import params_for  # only when TAB is pressed

    return params_for(context.params.get("words") or (), incomplete)


@click.command("exec", context_settings=CONTEXT)
@words_argument("[FILE] [TASK]...")
@click.option(
    "-p", "--param", "params", multiple=True, metavar="NAME=VALUE", envvar="TASKRUN_PARAM",
    shell_complete=_complete_param, help="Set a parameter, of one task by TASK.NAME=VALUE.",
)  # fmt: skip
@click.option("-n", "--dry-run", is_flag=True, help="Say what would run and why; run nothing.")
@click.option(
    "--address",
    metavar="A",
    allow_from_autoenv=False,
    help="Have the server at A run it.",
)
@click.option("--detach", is_flag=True, hidden=True, help="With --address: do not follow it.")
@run_options
@click.pass_context
def execute(
    context: click.Context,
    /,
    words: tuple[str, ...],
    params: tuple[str, ...],
    dry_run: bool,
    address: str | None,
    detach: bool,
    **options: Any,
) -> int:
    """Run the tasks of FILE (of the nearest tasks.py, upwards), or only the
    TASKs named and what they need."""
    check_needed(context)
    if address is not None:
        check_certificates(context, address)
        from taskrun.cli.submit import submit

        return submit(context, address, words, detach)
    if detach:
        raise UsageError("--detach is for runs of a server: say --address, too")
    if dry_run and options["json"]:
        raise UsageError("--dry-run has no --json form; leave one of them out")
    stdout = stdout_for_events(context, options)
    loaded, targets = load_words(words)
    plan = make_plan(loaded, targets, params)
    if dry_run:
        if not (options["inline"] or options.get("engine")):
            check_lanes(plan.tasks)
        click.echo(dry_run_text(plan))
        return 0
    from taskrun.coordinator import execute as execute_plan
    from taskrun.garbage import collecting_rarely

    with collecting_rarely:
        status = execute_plan(plan, settings_from(context, options), stdout=stdout)
        gc.freeze()  # this process ends: nobody need look through all the calls once more
    return status


def dry_run_text(plan: Plan) -> str:
    """A line a task: its name, how many calls, and why; or why it is left out."""
    calls = estimate(plan.tasks)
    wide = min(text.WIDEST, max(map(text.columns, [*calls, *plan.left_out])))
    wide_calls = max(len(count) for count in calls.values())
    lines = [
        f"{text.padded(name, wide)}  {count:{wide_calls}}  {plan.reasons[name]}"
        for name, count in calls.items()
    ]
    lines += [
        f"{text.padded(name, wide)}  left out: {needs_flags(missing)}"
        for name, missing in plan.left_out.items()
    ]
    return "\n".join(lines)
