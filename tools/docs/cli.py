"""Page docs/reference/cli.md: every command of `pretrain` with its arguments, options and exit codes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from pretrain_cli.app import main
from tools.docs.prose import wrapped

_HEAD = """# Command line

Generated from the commands of `pretrain` by `python -m tools.docs`: change those, not this page.
`pretrain COMMAND --help` prints the same.
"""
_TYPES = {bool: "flag", int: "integer", float: "number", str: "text"}


def commands() -> dict[str, TyperCommand]:
    """Return the commands of `pretrain` by name, in the order of `--help`."""
    group = get_command(main)
    if not isinstance(group, TyperGroup):
        raise TypeError(f"pretrain is a {type(group).__name__}, not a group of commands")
    return {name: command for name, command in group.commands.items() if isinstance(command, TyperCommand)}


def text() -> str:
    """Return the whole page: a section for each command."""
    return wrapped(_HEAD + "".join(_section(name, command) for name, command in commands().items()))


def _section(name: str, command: TyperCommand) -> str:
    arguments = [it for it in command.params if isinstance(it, TyperArgument)]
    options = [it for it in command.params if isinstance(it, TyperOption) and not it.hidden]
    usage = " ".join(["pretrain", name, *(str(it.metavar or it.name.upper()) for it in arguments), "[OPTIONS]"])
    about = inspect.cleandoc(command.help or "")
    return "\n".join(
        (
            f"\n## `pretrain {name}`\n",
            about,
            f"\n```text\n{usage}\n```\n",
            *_arguments(arguments),
            *_options(options),
            "",
        )
    )


def _arguments(arguments: list[TyperArgument]) -> Iterator[str]:
    if arguments:
        yield "| argument | meaning |\n| --- | --- |"
        yield from (f"| `{_cell(str(it.metavar or it.name.upper()))}` | {_cell(it.help or '')} |" for it in arguments)
        yield ""


def _options(options: list[TyperOption]) -> Iterator[str]:
    if options:
        yield "| option | value | default | meaning |\n| --- | --- | --- | --- |"
        yield from (_option(it) for it in options)


def _option(option: TyperOption) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    times = " (repeatable)" if option.multiple else ""
    return f"| {names}{times} | {_value(option)} | {_default(option)} | {_cell(option.help or '')} |"


def _value(option: TyperOption) -> str:
    kind = option.type_descriptor.annotation
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    low = f"from {option.min}" if option.min is not None else ""
    high = f"to {option.max}" if option.max is not None else ""
    bounds = " ".join(part for part in (low, high) if part)
    name = f"`{option.metavar}`" if option.metavar else _TYPES.get(kind, "text")
    return f"{name}, {bounds}" if bounds else name


def _default(option: TyperOption) -> str:
    if option.required:
        return "required"
    if option.default in (None, False, ()):
        return ""
    return f"`{option.default if isinstance(option.default, str) else json.dumps(option.default, default=str)}`"


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|")
