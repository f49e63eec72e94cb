"""Which implementation an operation picks, by device and by arguments, and what it says about it."""

import importlib.util
import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from kvjax.kernels import dispatch, targets
from kvjax.kernels.dispatch import Implementation, Operation, UnsupportedError
from kvjax.kernels.targets import TargetError

X = jnp.ones(4)
TIMES = Operation(
    "times",
    (
        Implementation("mosaic_gpu", lambda x: x * 3, lambda x: None if x.ndim == 1 else f"{x.ndim} dims"),
        Implementation("mosaic_tpu", lambda x: x * 5),
        Implementation("xla", lambda x: x * 2),
    ),
)


def on(platform: str, kind: str):
    return use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=AbstractDevice(kind, 132, platform)))


@pytest.fixture(autouse=True)
def forget():
    dispatch._log_once.cache_clear()


@pytest.mark.parametrize(
    ("platform", "kind", "name"),
    [
        ("gpu", "NVIDIA H200", "mosaic_gpu"),
        ("gpu", "NVIDIA H100 80GB HBM3", "mosaic_gpu"),
        ("gpu", "NVIDIA GH200 480GB", "mosaic_gpu"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "xla"),
        ("gpu", "NVIDIA B200", "xla"),
        ("tpu", "TPU v5 lite", "mosaic_tpu"),
        ("cpu", "cpu", "xla"),
    ],
)
def test_device_of_the_mesh_decides(platform, kind, name):
    with on(platform, kind):
        assert TIMES.choose(X).name == name


def test_here_it_is_the_default_device():
    assert dispatch.current_device() == dispatch.Device("cpu", "cpu")
    assert TIMES(X).tolist() == [2] * 4


def test_program_traced_for_one_device_is_not_used_for_another():
    call = jax.jit(lambda x: TIMES(x))
    factors = []
    for platform, kind in (("cpu", "cpu"), ("gpu", "NVIDIA H200"), ("tpu", "TPU v5 lite"), ("cpu", "cpu")):
        with on(platform, kind):
            jaxpr = call.trace(jax.ShapeDtypeStruct((4,), jnp.float32)).jaxpr
        factors.append(float(jaxpr.eqns[0].invars[1].val))
    assert factors == [2, 3, 5, 2]


def test_reason_is_logged_once(caplog):
    matrix = jnp.ones((2, 2))
    with on("gpu", "NVIDIA H200"), caplog.at_level(logging.WARNING):
        assert [TIMES.choose(matrix).name for _ in range(3)] == ["xla"] * 3
        assert [record.getMessage() for record in caplog.records] == ["times: mosaic_gpu is not used: 2 dims"]


def test_kernels_of_other_platforms_are_not_worth_a_line(caplog):
    with caplog.at_level(logging.WARNING):
        TIMES(X)
    assert not caplog.records


@pytest.mark.parametrize(
    ("x", "name", "message"),
    [
        (X, "mosaic_gpu", "times: mosaic_gpu cannot run this: it needs an NVIDIA GPU, this is 'cpu'"),
        (X, "mosaic_tpu", "times: mosaic_tpu cannot run this: it needs a TPU, this is 'cpu'"),
        (X, "triton", "times: there is no implementation 'triton'; choose from mosaic_gpu, mosaic_tpu, xla"),
    ],
)
def test_forced_implementation_that_cannot(x, name, message):
    with pytest.raises(UnsupportedError, match=message):
        TIMES(x, implementation=name)


def test_forced_implementation_says_why_not():
    with on("gpu", "NVIDIA H200"), pytest.raises(UnsupportedError, match="mosaic_gpu cannot run this: 2 dims"):
        TIMES.choose(jnp.ones((2, 2)), implementation="mosaic_gpu")
    with on("gpu", "NVIDIA A100"), pytest.raises(UnsupportedError, match="written for Hopper"):
        TIMES.choose(X, implementation="mosaic_gpu")


def test_nothing_can():
    operation = Operation("times", (Implementation("mosaic_gpu", lambda x: x), Implementation("mosaic_tpu", lambda x: x)))
    with pytest.raises(UnsupportedError, match="nothing can run this: mosaic_gpu: it needs an NVIDIA GPU"):
        operation(X)


def test_interpreted_kernels_are_chosen_on_a_cpu():
    call = jax.jit(lambda x: TIMES(x))
    assert call(X).tolist() == [2] * 4
    with dispatch.interpreted("mosaic_gpu"):
        assert call(X).tolist() == [3] * 4
    with dispatch.interpreted("mosaic_tpu"):
        assert call(X).tolist() == [5] * 4
    assert call(X).tolist() == [2] * 4


def test_unknown_target():
    with pytest.raises(TargetError, match="there is no target 'h300'; choose from h200, v5e, v6e"):
        targets.by_name("h300")


@pytest.mark.parametrize("name", targets.TARGETS)
def test_target_is_there_or_names_the_extra(name):
    module, package = ("jax_plugins.xla_cuda13", "nvidia-cuda-nvcc") if name == "h200" else ("libtpu", "libtpu")
    try:
        installed = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        with pytest.raises(TargetError, match=rf"cannot compile for {name}: .*pip install 'kvjax\[aot\]' brings .*{package}"):
            targets.by_name(name)
        return
    target = targets.by_name(name)
    with jax.set_mesh(target.mesh):
        assert dispatch.current_device().platform == target.platform == ("gpu" if name == "h200" else "tpu")
