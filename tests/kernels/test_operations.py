"""What the package of kernels holds, and what stands here for each of its operations."""

import ast
import importlib
import pathlib
import sys

import pytest
from kvjax.kernels import OPERATIONS
from kvjax.kernels.dispatch import Operation

from experiments.gpu import correctness
from kvjax import kernels

PACKAGE = pathlib.Path(kernels.__path__[0])


def test_every_package_is_an_operation():
    assert sorted((*OPERATIONS, "attention")) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_cases_a_reference_and_shapes(name):
    cases, reference, shapes = (importlib.import_module(f"tests.kernels.{name}.{part}") for part in ("cases", "reference", "shapes"))
    assert cases.CASES
    assert cases.reference is reference
    listed = list(shapes.cases())
    assert any(case.quick for case in listed)
    assert len({(case.implementation, case.name) for case in listed}) == len(listed)


def test_every_operation_is_checked_on_a_card():
    found = {
        value.name for name in OPERATIONS for value in vars(importlib.import_module(f"kvjax.kernels.{name}.api")).values()
        if isinstance(value, Operation)
    }  # fmt: skip
    assert found == set(correctness._listed("xla")) == set(correctness._listed("mosaic_gpu")) == set(correctness._repeated())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_jax_alone(path):
    """What ships is kernels: neither the library above them nor what they are tested with."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add((node.module or "").split(".")[0])
    assert imported - {"jax"} <= sys.stdlib_module_names
    assert path.stem not in ("cases", "proof", "reference", "shapes")
