"""Names the packages, kernels/ as kvjax.kernels among them; the rest of the build is described in pyproject.toml."""

from setuptools import find_packages, setup

kernels = ["kvjax.kernels", *(f"kvjax.kernels.{name}" for name in find_packages("kernels"))]
setup(packages=[*find_packages(include=["kvjax", "kvjax.*"]), *kernels])
