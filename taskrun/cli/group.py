"""``taskrun`` itself: the list of commands, each imported only when it is used."""

from __future__ import annotations

import click

from taskrun import __version__

_LOOK = "Show what a live run is doing, and why."
_STEER = "Steer a live run."
_NODE = "Join a machine's cores; have it leave."
_SERVE = "Take many runs, and follow one of them."

# name: (module, object in it, what it does; those that do the same are listed together)
COMMANDS = {
    "exec": ("taskrun.cli.execute", "execute", "Run the tasks of a file."),
    "map": ("taskrun.cli.mapping", "map_", "Call a function per argument or line of stdin."),
    "list": ("taskrun.cli.listing", "list_", "Show the tasks of a file."),
    "graph": ("taskrun.cli.graph", "graph", "Show which task needs which."),
    "status": ("taskrun.cli.steer", "status", _LOOK),
    "explain": ("taskrun.cli.steer", "explain", _LOOK),
    "stack": ("taskrun.cli.steer", "stack", _LOOK),
    "cancel": ("taskrun.cli.steer", "cancel", _STEER),
    "tell": ("taskrun.cli.steer", "tell", _STEER),
    "pause": ("taskrun.cli.steer", "pause", _STEER),
    "unpause": ("taskrun.cli.steer", "unpause", _STEER),
    "serve": ("taskrun.cli.serve", "serve", _SERVE),
    "attach": ("taskrun.cli.serve", "attach", _SERVE),
    "worker": ("taskrun.cli.worker", "worker", _NODE),
    "drain": ("taskrun.cli.steer", "drain", _NODE),
    "state": ("taskrun.cli.state", "state", "Look at the shared state of a live run."),
    "key": ("taskrun.cli.key", "key", "Make the key file that machines must share."),
    "completion": ("taskrun.cli.completion", "completion", "Print a shell's completion script."),
}
MEANT = {"run": "exec", "start": "exec", "ls": "list", "tasks": "list", "help": "--help"}
"""What people type who come from other tools."""


class LazyGroup(click.Group):
    """A group that knows its commands by name, and imports the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module

        module, name, _ = COMMANDS[cmd_name]
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        together: dict[str, list[str]] = {}
        for name, (_, _, does) in COMMANDS.items():
            together.setdefault(does, []).append(name)
        with formatter.section("Commands"):
            formatter.write_dl([(", ".join(names), does) for does, names in together.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(_no_such_command(name))
        return super().resolve_command(ctx, args)


def _no_such_command(name: str) -> str:
    from taskrun.model import nearest

    near = MEANT.get(name) or nearest(name, list(COMMANDS))
    if name.endswith(".py"):
        near = f"exec {name}"
    hint = f"did you mean {near!r}?" if near else f"there are {', '.join(COMMANDS)}"
    return f"no such command {name!r}; {hint}"


@click.command(
    cls=LazyGroup,
    invoke_without_command=True,
    epilog="Every option can be given as a variable too: TASKRUN_JOBS=4 is --jobs 4.",
)
@click.version_option(
    __version__, prog_name="taskrun", message="%(prog)s %(version)s", allow_from_autoenv=False
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Run the tasks of a Python file on all your cores."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
