"""Makes one page of a study: figures, tables, the ledger and downloads in a single HTML file that loads nothing.

    python -m kvjax.report experiments/results/study_cpu
    python -m kvjax.report runs/study --output=runs/study.html

Figures that are the page's own are also written beside it, as PNG and SVG (report-pareto.png, report-ledger.svg); the others lie with
their experiments.

The directory is one that an experiment of experiments/study wrote: <experiment>/records.jsonl, about.json and
figures, and STUDY.md where it was written. What is missing is left out, a torn record is skipped, and the page says so.
"""

import pathlib

from absl import flags

from kvjax.command import answered, start
from kvjax.errors import InputError
from kvjax.files import replace
from kvjax.report.html import page
from kvjax.report.html_data import read

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_string("output", None, "Where the page goes; default: report.html in the directory.")


def run(directory: pathlib.Path, output: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the page of a results directory, whole or not at all, and its own figures beside it. Raises InputError."""
    results = read(directory)
    path = output or directory / "report.html"
    if path.is_dir():
        raise InputError(f"--output={path} is a directory; name a file, such as {path / 'report.html'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, page(results, path.with_suffix("")))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    return path


def main(argv: list[str]) -> None:
    with answered():
        if len(argv) != 2:
            raise InputError("give one results directory: python -m kvjax.report RESULTS_DIR [--output=PAGE.html]")
        path = run(pathlib.Path(argv[1]), pathlib.Path(FLAGS.output) if FLAGS.output else None)
        print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    define_flags()
    start(main)
