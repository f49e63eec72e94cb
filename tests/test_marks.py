"""The patterns by which cells are left to the slow tests find what they are about: a renamed file would bring its cells back unseen."""

import pathlib
import re

import pytest

from tests.conftest import FURTHER

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("pattern", FURTHER)
def test_a_pattern_is_about_files_and_functions_that_are_there(pattern):
    found = re.findall(r"(test_\w+)\\\.py::(\w*)", pattern)  # the file, and how its functions' names begin
    assert found
    for name, begins in found:
        (path,) = HERE.rglob(f"{name}.py")
        assert re.search(rf"^def {begins}", path.read_text(), re.MULTILINE), f"{path.name} has no {begins}"
