"""How the commands show themselves: whole summaries, plain usage lines, and two examples below every `--help`.

A command's examples are the last part of its docstring, behind a line `Examples:`, one a line. Typer prints the rest
as the help text; the examples become the command's epilog.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from crystal.output.printable import writable

_HEADING = "\nExamples:\n"


class Commands(typer.Typer):
    """A group of commands that are shown as described above."""

    def __init__(self, *, cls: type[TyperGroup] | None = None, **settings: Any):
        plain = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}
        super().__init__(cls=cls or Group, **plain | settings)

    def command(self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **settings: Any):
        return super().command(name, cls=cls or Command, **settings)


def _with_examples(settings: dict[str, Any]) -> dict[str, Any]:
    """Move the examples from the help text to the epilog."""
    text, heading, examples = inspect.cleandoc(settings.get("help") or "").partition(_HEADING)
    return settings | {"help": text.rstrip(), "epilog": inspect.cleandoc(examples)} if heading else settings


def _write_examples(epilog: str | None, formatter: Any) -> None:
    if epilog:
        with formatter.section("Examples"):
            formatter.write("".join(f"  {line}\n" for line in epilog.splitlines()))


def shown_name(parameter: Any) -> str:
    """What an argument is called in usage lines and help: its metavar."""
    return parameter.metavar or parameter.name.upper()


class _Printed:
    """Help as typer prints it, which takes a terminal without UTF-8 for one with it."""

    def get_help(self, ctx: Any) -> str:
        return writable(super().get_help(ctx), sys.stdout.encoding)


class Command(_Printed, TyperCommand):
    """One command."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **_with_examples(settings))

    def get_short_help_str(self, limit: int = 0) -> str:
        """The whole summary; the width of the list it stands in is the list's concern."""
        return super().get_short_help_str(1000)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:  # a usage error that would be taken for the group's
                error.ctx = ctx
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces = [self.options_metavar or ""]
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "argument":
                name = shown_name(parameter) if parameter.required else f"[{shown_name(parameter)}]"
                pieces.append(name + ("..." if parameter.nargs != 1 else ""))
        return pieces

    def format_options(self, ctx: Any, formatter: Any) -> None:
        arguments, options = [], []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and parameter.param_type_name == "argument":
                arguments.append((shown_name(parameter), record[1]))
            elif record:
                options.append(record)
        for heading, records in (("Arguments", arguments), ("Options", options)):
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(self.epilog, formatter)


class Group(_Printed, TyperGroup):
    """A command that is a group of others."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **_with_examples(settings))

    def get_short_help_str(self, limit: int = 0) -> str:
        """The whole summary."""
        return super().get_short_help_str(1000)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(self.epilog, formatter)
