"""The command line: a group that imports a command's module only when the command runs, so that --help is instant."""

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper

import click

from keepwarm.traces.errors import InputError
from keepwarm.traces.shipped import shipped

COMMANDS: dict[str, tuple[str, str]] = shipped("keepwarm.harness", "cli.toml")


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f"keepwarm.harness.{module}"), function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("keepwarm"), prog_name="keepwarm")
def cli() -> None:
    """keepwarm records what coding agents ask of a language model, asks it again, of any endpoint, and says how much of
    the prompt was still warm in the cache, what each finished task cost, and how long the slow calls took.
    """


INTERRUPTED, BROKEN_PIPE = 130, 141


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. What a user did wrong, or a disk refused, is told on stderr, exit code 2; an interrupt is
    130; a reader that went away is 141, as if the signal had ended the program.
    """
    gc.set_threshold(10_000)  # each 700, its default, a large trace's living objects are looked at in vain
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal's encoding has not
    code = _run(argv)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tells of it once more when it ends
        code = code or BROKEN_PIPE
    sys.exit(code)


def _run(argv: Sequence[str] | None) -> int:
    """The exit code of a command line. Not by click's ``main``, which makes a broken pipe a 1: a failed gate."""
    try:
        with cli.make_context("keepwarm", list(sys.argv[1:] if argv is None else argv)) as context:
            cli.invoke(context)
        return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except InputError as error:
        return _told(str(error))
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as bare:
        bare.show()
        return bare.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "keepwarm"
        return _told(f"{' '.join(error.format_message().split())} (see {where} --help)")
    except BrokenPipeError:
        return BROKEN_PIPE
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich's way to say so
            return BROKEN_PIPE
        raise
    except OSError as error:
        return _told(f"{error.filename or 'output'}: {error.strerror or error}")


def _told(text: str) -> int:
    click.echo(f"keepwarm: {text}", err=True)
    return 2


if __name__ == "__main__":
    main()
