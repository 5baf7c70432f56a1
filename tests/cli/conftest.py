"""Run the command as a user does, in this process."""

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Ran:
    """What a command left on the screen."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Everything, without the frames and line breaks of panels."""
        return " ".join((self.out + self.err).replace("│", " ").split())


@pytest.fixture
def command(monkeypatch, capsys):
    """Call `dit-accel` with arguments; gives its exit code and output."""

    def run(*arguments: object) -> Ran:
        from dit_accel.cli import main

        monkeypatch.setenv(
            "COLUMNS", "300"
        )  # a long temporary path must not break a line that a test looks for
        monkeypatch.setattr("sys.argv", ["dit-accel", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return Ran(int(ended.value.code or 0), shown.out, shown.err)

    return run
