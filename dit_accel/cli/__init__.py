"""The command line: `dit-accel generate | compare | bench | search | recipes | doctor | demo`.

One file for each command; what they do is in the library. Heavy libraries are imported inside the
commands, so that `--help` is instant. Exit codes: 0 done, 1 failed, 2 cannot be done as asked.
"""

import typer

from dit_accel.cli.bench import EXAMPLES as BENCH_EXAMPLES
from dit_accel.cli.bench import bench
from dit_accel.cli.compare import EXAMPLES as COMPARE_EXAMPLES
from dit_accel.cli.compare import compare
from dit_accel.cli.demo import demo
from dit_accel.cli.doctor import doctor
from dit_accel.cli.generate import EXAMPLES as GENERATE_EXAMPLES
from dit_accel.cli.generate import generate
from dit_accel.cli.recipes import recipes
from dit_accel.cli.screen import Commands, Debug
from dit_accel.cli.search import EXAMPLES as SEARCH_EXAMPLES
from dit_accel.cli.search import search

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    name="dit-accel",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=GENERATE_EXAMPLES)(generate)
app.command(epilog=COMPARE_EXAMPLES)(compare)
app.command(epilog=BENCH_EXAMPLES)(bench)
app.command(epilog=SEARCH_EXAMPLES)(search)
app.add_typer(recipes, name="recipes")
app.command()(doctor)
app.command()(demo)


def _version(asked: bool) -> None:
    if asked:
        from dit_accel.machine import version_of

        typer.echo(f"dit-accel {version_of('dit_accel') or 'from a source tree'}")
        raise typer.Exit


@app.callback()
def root(
    debug: Debug = False,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Several times faster diffusers transformer pipelines, with the cost stated.

    Start with `dit-accel demo`, then `dit-accel generate --help`.
    """


def main() -> None:
    """Entry point of the `dit-accel` program."""
    app()
