"""What a person sees: error panels instead of tracebacks, progress with the time left, tables."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

from dit_accel.errors import BadUsage, DitAccelError

screen = Console(soft_wrap=True)  # results
errors = Console(stderr=True)  # progress, warnings, errors


def _remember_debug(context: typer.Context, debug: bool) -> bool:
    if debug:
        context.find_root().meta["dit_accel.debug"] = True
    return debug


Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_remember_debug, help="Show the traceback of an error.", show_default=False
    ),
]


class Commands(TyperGroup):
    """A group whose errors end as a panel and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; turn an exception into a panel unless --debug asks for the traceback."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("always", "dit_accel: ", UserWarning)
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            # typer's own errors carry their exit code and are printed by it
            if hasattr(error, "exit_code") or ctx.find_root().meta.get("dit_accel.debug"):
                raise
            show_error(error)
            raise typer.Exit(2 if isinstance(error, BadUsage) else 1) from None


def show_error(error: Exception) -> None:
    """A panel on stderr: our errors already say what was asked, what was found and what to do."""
    if isinstance(error, DitAccelError):
        title, text = ("Cannot do that" if isinstance(error, BadUsage) else "Failed"), str(error)
    elif type(error).__name__ == "OutOfMemoryError":
        title = "Out of memory"
        text = f"{error}\nUse --offload, --dtype bfloat16, or a smaller --height, --width or --num-frames."
    else:
        title = "Failed"
        text = f"{type(error).__name__}: {error}\nRun it again with --debug for the traceback."
    errors.print(Panel(text, title=title, title_align="left", border_style="red"), markup=False)


def say(text: str) -> None:
    """A line of the result, as it is."""
    screen.print(text, markup=False, highlight=False)


def warn(text: str) -> None:
    """A line on stderr."""
    errors.print(f"[yellow]warning:[/] {_plain(text)}", soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Python warnings that are meant for users, without the line of code that raised them."""
    if issubclass(category, UserWarning):
        warn(str(message).removeprefix("dit_accel: "))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


class Once(logging.Filter):
    """Lets each message pass once: a pipeline repeats its own at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this message is new."""
        text = record.getMessage()
        new = text not in self.seen
        self.seen.add(text)
        return new


@contextmanager
def results_to_stderr(active: bool) -> Iterator[None]:
    """While stdout is kept for JSON, everything that would be printed there goes to stderr."""
    if not active:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def asked_for() -> Iterator[None]:
    """What fails inside was asked for wrongly: nothing has been started."""
    try:
        yield
    except BadUsage:
        raise
    except DitAccelError as error:
        raise BadUsage(str(error)) from error


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner for work that cannot tell how far it is."""
    with errors.status(_plain(what)):
        yield


class Bars:
    """Progress of generations and of the steps of the current one, both with the time left."""

    def __init__(self) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=errors,
            refresh_per_second=4,
        )
        self.all: TaskID | None = None
        self.steps: TaskID | None = None

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # the last generation's end is nobody's beginning
            for task in self.progress.tasks:
                self.progress.update(task.id, completed=task.total)
        self.progress.stop()

    def generation(self, done: int, total: int, what: str) -> None:
        """Generation `done` of `total` begins."""
        if self.all is None:
            self.all = self.progress.add_task("generations", total=total)
        self.progress.update(self.all, completed=done, total=total)
        if self.steps is not None:
            self.progress.remove_task(self.steps)
        self.steps = self.progress.add_task(what if len(what) < 48 else f"{what[:47]}…", total=None)

    def step(self, done: int, total: int) -> None:
        """A denoising step has ended."""
        if self.steps is None:
            self.steps = self.progress.add_task("steps", total=total)
        self.progress.update(self.steps, completed=done, total=total)
