"""`dit-accel doctor`: what is here, what is missing, and why."""

import typer
from rich.table import Table

from dit_accel.cli.screen import Debug, screen


def doctor(debug: Debug = False) -> None:
    """Versions, devices, kernel backends and shipped models; what is missing, why, and what to do.

    Exit code 1 if something that generation needs is missing. Example: `dit-accel doctor`
    """
    from dit_accel.doctor import examine

    findings = examine()
    for part in dict.fromkeys(finding.part for finding in findings):
        drawn = Table(title=part, title_justify="left", show_header=False, min_width=60)
        for finding in findings:
            if finding.part == part:
                mark = {True: "[green]yes[/]", False: "[red]missing[/]", None: "[yellow]no[/]"}[finding.fine]
                drawn.add_row(finding.name, mark, finding.said)
        screen.print(drawn, soft_wrap=False)
    if any(finding.fine is False for finding in findings):
        raise typer.Exit(1)
