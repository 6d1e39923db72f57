"""What all commands share: how one is declared, several values behind one option, plain help, and errors in
one line."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import get_type_hints

import typer
from typer.core import TyperCommand

from harness.cli import terminal
from harness.cli.terminal import WIDTH
from harness.tasks import environment
from methods.errors import UserError

SETTINGS = {
    "terminal_width": min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns),
    "help_option_names": ["-h", "--help"],
}

app = typer.Typer(
    help="Tools around run_all.py. `python -m harness COMMAND --help` explains each.",
    add_completion=False,
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


class Command(TyperCommand):
    """A command whose list options take several values each (`--budget 192 128 64`), and whose help shows
    options under their headings and examples as they were written."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        several = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        return super().parse_args(ctx, list(repeated(args, several)))

    def format_help_text(self, ctx, formatter) -> None:
        paragraphs = (" ".join(p.split()) for p in (self.help or "").split("\n\n"))
        formatter.write("\n" + "\n\n".join(textwrap.fill(p, WIDTH) for p in paragraphs) + "\n")

    def format_options(self, ctx, formatter) -> None:
        groups: dict[str, list] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                default = "arguments" if parameter.param_type_name == "argument" else "options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx, formatter) -> None:
        if self.epilog:
            formatter.write("\n" + self.epilog.rstrip() + "\n")


def repeated(arguments: Sequence[str], several: set[str]) -> Iterator[str]:
    """`--budget 192 128` as `--budget 192 --budget 128`, for the options in `several`."""
    option, values = None, 0
    for argument in arguments:
        if re.match(r"--?[^\d.]", argument):
            option, values = (argument if argument in several else None), 0
        elif option:
            values += 1
            if values > 1:
                yield option
        yield argument


def command(name: str, examples: str = "") -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Declare a command of `python -m harness`. Its docstring is its help; parameters whose type is a
    dataclass are that class's fields, one option each. It returns the exit code."""

    def declare(function: Callable[..., int]) -> Callable[..., int]:
        description = inspect.cleandoc(function.__doc__ or "")
        short = " ".join(description.partition("\n\n")[0].split()).rstrip(".")
        texts = {"help": description, "short_help": short, "epilog": examples}
        app.command(name, cls=Command, context_settings=SETTINGS, **texts)(flat(function))
        return function

    return declare


def flat(function: Callable[..., int]) -> Callable[..., int]:
    """`function` with the fields of its dataclass parameters as parameters of their own."""
    signature = inspect.signature(function, eval_str=True)
    classes = {
        p.name: p.annotation for p in signature.parameters.values() if dataclasses.is_dataclass(p.annotation)
    }
    parameters = []
    for parameter in signature.parameters.values():
        cls = classes.get(parameter.name)
        if cls is None:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(cls, include_extras=True)
        for f in dataclasses.fields(cls):
            default = parameter.empty if f.default is dataclasses.MISSING else f.default
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            parameters.append(
                inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=default, annotation=hints[f.name])
            )

    @functools.wraps(function)
    def call(**given: object) -> int:
        for name, cls in classes.items():
            given[name] = cls(**{f.name: given.pop(f.name) for f in dataclasses.fields(cls)})
        return function(**given)

    del call.__wrapped__
    call.__signature__ = signature.replace(parameters=parameters)
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def defaults_of(options: type) -> Callable[[type], type]:
    """Class decorator, inside @dataclass: fields have the defaults that those of `options` have."""

    def given(cls: type) -> type:
        for name in cls.__annotations__:
            setattr(cls, name, getattr(options, name))
        return cls

    return given


def invoke(parser: TyperCommand, arguments: Sequence[str] | None, name: str) -> int:
    """Run a command line; its exit code. Bad input is one line and 2; Ctrl-C says how to go on, and is 130.

    A reader that closes the pipe early (`--list | head`) ends the command in silence.
    """
    environment.share_processor()
    terminal.attach()
    try:
        code = parser.main(args=arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        return refused(str(error))
    except typer.TyperException as error:
        return refused(explained(error))
    except BrokenPipeError:
        code = 1
    except OSError as error:
        if error.filename is None or error.errno is None:
            raise
        return refused(f"{os.fsdecode(error.filename)}: {os.strerror(error.errno)}")
    except SystemExit as end:  # typer's own way out for a closed pipe, and a process that is not the first
        code = end.code
    except KeyboardInterrupt:
        code = 130
    if code == 130:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
    return code or 0


def refused(text: str) -> int:
    print("error: " + " ".join(text.split()), file=sys.stderr)
    return 2


def explained(error: typer.TyperException) -> str:
    """What is wrong with the command line, beginning with the option or argument."""
    message = error.format_message()
    parameter = getattr(error, "param", None)
    if parameter is not None:
        what = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
        message = error.message.removeprefix("Value error, ") or "is missing"
        return f"{what}: {message}"
    return message[:1].lower() + message[1:]
