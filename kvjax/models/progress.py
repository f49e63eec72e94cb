"""Progress of a fetch, on the terminal: on standard error, so that what a program prints stays its own."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from kvjax.models.public import Report


@contextlib.contextmanager
def shown() -> Iterator[Report]:
    """A bar from the first report on, as long as there is work; on a stream that is no terminal, a line per step."""
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        bar: list[Progress] = []
        steps: list[str] = []

        def report(what: str, done: int, total: int) -> None:
            if not steps or steps[-1] != what:
                steps.append(what)
                if not console.is_terminal:
                    console.print(f"kvjax: {what}", highlight=False, soft_wrap=True)
            if console.is_terminal:
                if not bar:
                    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
                    bar.append(stack.enter_context(Progress(*columns, console=console, transient=True)))
                    bar[0].add_task(what, total=total)
                bar[0].update(bar[0].task_ids[0], description=what, completed=done, total=total)

        yield report
