"""``taskrun completion``: the script that makes a shell complete commands and tasks."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from taskrun.cli.options import CONTEXT


@click.command("completion", context_settings=CONTEXT)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), metavar="SHELL")
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete commands, options and tasks.

    \b
    bash: eval "$(taskrun completion bash)"     in ~/.bashrc
    zsh:  eval "$(taskrun completion zsh)"      in ~/.zshrc
    fish: taskrun completion fish | source      in ~/.config/fish/config.fish
    """
    from taskrun.cli.group import cli
    from taskrun.cli.main import COMPLETE_VARIABLE

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "taskrun", COMPLETE_VARIABLE).source())
