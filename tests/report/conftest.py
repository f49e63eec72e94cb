"""The page of a made study, written once a process."""

import pathlib

import made_study
import pytest

from kvjax.report.__main__ import run


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> pathlib.Path:
    """A results directory with report.html in it; the last line of one experiment is torn."""
    directory = made_study.write(tmp_path_factory.mktemp("made"))
    with (directory / "retention" / "records.jsonl").open("a") as file:
        file.write('{"strategy": "fu')
    run(directory)
    return directory
