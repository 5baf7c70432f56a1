"""How far a training is: a bar with the time left on a terminal, or whoever else wants to hear."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dit_accel.train.log import Numbers

Told = Callable[[int, int, Numbers], None]  # steps done, steps in all, the numbers of the last one


class Bar:
    """Tells `told` of every step, or draws a bar; only the `lead` process does."""

    def __init__(self, first: int, total: int, told: Told | None, lead: bool):
        self.total, self.told, self.lead = total, told, lead
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.description}", markup=False),
            console=console,
            refresh_per_second=4,
            disable=told is not None or not lead or not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total, completed=first)
        self._said: set[str] = set()

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, done: int, numbers: Numbers) -> None:
        """A step has ended."""
        if not self.lead:
            return
        if self.told is not None:
            self.told(done, self.total, numbers)
        said = " ".join(f"{key} {value:.4g}" for key, value in list(numbers.items())[:2])
        self.progress.update(self.task, completed=done, description=said)

    def say(self, text: str) -> None:
        """A sentence, once."""
        if text not in self._said:
            self._said.add(text)
            self.progress.console.print(text, markup=False, highlight=False)
