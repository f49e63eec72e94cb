"""Compiles every kernel at real shapes for devices that are not here: an H200 down to its machine code, TPU v5e and v6e with libtpu.

    make aot                                        everything
    python -m experiments.aot --quick               the short list; writes nothing unless --output_dir is given
    python -m experiments.aot --targets=h200 --operations=paged_attention --match='int8|statistics'

Writes records.jsonl and aot.md as cases finish, into experiments/results/aot. A case that passed is not compiled again (--again does)
unless its kernel, what all kernels share, or a compiler has changed since; such a record is dropped.

Nothing runs: what is reported was said by the compilers. For a GPU kernel those are registers, spilled bytes and stack of a thread as
ptxas gives them, shared memory from the kernel's own allocations, and the blocks that fit on a multiprocessor at once, a bound from those
two. Temporary memory comes from XLA. A kernel that spills, or a step that copies as much as it reads, fails the run, as does a refusal.

Needs the extra `aot` (a target whose compiler is missing is an error, and says so); exits with 1 when anything failed.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # or JAX would look for the cards
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata

import jax
import jaxlib
from kvjax.kernels import targets
from kvjax.kernels.targets import Target, TargetError

from kvjax import kernels
from kvjax.files import dumps, replace
from tests.kernels import shapes
from tests.kernels.shapes import Case

REGISTERS, SHARED_MEMORY, THREADS = 65536, 227 * 1024, 2048  # of a Hopper multiprocessor
RESULTS = pathlib.Path("experiments/results/aot")
RESERVED = 1024  # bytes of shared memory the driver takes for each block
WARPGROUP = 128


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel, per thread, and what follows.

    Attributes:
      shared_memory: bytes a block allocates.
      blocks: that fit on a multiprocessor at once.
    """

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared_memory: int
    threads: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One case on one target.

    Attributes:
      temp: bytes XLA allocates beside arguments and results.
      read: bytes of keys and values the call has to read.
      source: of what was compiled (`source_of`).
      error: why it failed, or None.
    """

    target: str
    operation: str
    implementation: str
    case: str
    seconds: float
    read: int
    source: str
    temp: int | None = None
    kernels: tuple[Kernel, ...] = ()
    error: str | None = None


def operations() -> dict[str, list[Case]]:
    """The cases of every operation."""
    return {name: list(importlib.import_module(f"tests.kernels.{name}.shapes").cases()) for name in kernels.OPERATIONS}


@functools.cache
def source_of(operation: str) -> str:
    """A fingerprint of an operation's code, of what all of them share, and of the shapes."""
    base, cases = pathlib.Path(kernels.__path__[0]), pathlib.Path(shapes.__file__).parent
    files = [path for path in (base / operation).iterdir() if path.suffix in (".py", ".json")]
    shared = [base / f"{name}.py" for name in ("dispatch", "targets", "tuned")]
    found = hashlib.sha256()
    for path in [*sorted(files), *shared, cases / operation / "shapes.py", cases / "shapes.py"]:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def runs_on(case: Case, target: str) -> bool:
    """Whether a target, by name, has the implementation."""
    return case.implementation in ("xla", "mosaic_gpu" if target == "h200" else "mosaic_tpu")


def compile_case(operation: str, case: Case, target: Target, seen: dict[int, tuple[Kernel, ...]]) -> Outcome:
    """Compiles a case, and reads what the compilers report; `seen` holds the kernels of programs compiled before."""
    start = time.perf_counter()
    outcome = Outcome(target.name, operation, case.implementation, case.name, 0.0, case.read, source_of(operation))
    try:
        with jax.set_mesh(target.mesh), captured_output() as output:
            traced = jax.jit(case.call).trace(target.abstract(case.arguments))
            lowered = traced.lower()
            compiled = lowered.compile()
        resources = [*block_resources(traced.jaxpr.jaxpr)]
        found = tuple(parse_ptxas(output[0], resources)) if target.platform == "gpu" else ()
        found = seen.setdefault(hash(lowered.as_text()), found)  # the same kernel is not compiled twice in one process
        outcome = dataclasses.replace(outcome, temp=compiled.memory_analysis().temp_size_in_bytes, kernels=found)
        outcome = dataclasses.replace(outcome, error=complaint(outcome, case, target))
    except Exception as error:  # any refusal of any compiler is a result
        outcome = dataclasses.replace(outcome, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
    return dataclasses.replace(outcome, seconds=round(time.perf_counter() - start, 2))


def complaint(outcome: Outcome, case: Case, target: Target) -> str | None:
    """What is wrong with a case that compiled."""
    if case.implementation == "mosaic_gpu" and not outcome.kernels:
        return "ptxas reported no kernel"
    for kernel in outcome.kernels:
        if kernel.spill_stores or kernel.spill_loads:
            return f"{kernel.name} spills {kernel.spill_stores} and {kernel.spill_loads} bytes"
        if kernel.blocks < 1:
            return f"{kernel.name} does not fit a multiprocessor: {kernel.registers} registers, {kernel.shared_memory} bytes"
    if case.implementation != "xla" and outcome.temp is not None and outcome.temp > max(case.read // 4, 1 << 20):
        return f"{outcome.temp} bytes of temporary memory for {case.read} read: something is copied"
    return None


def parse_ptxas(text: str, resources: Sequence[tuple[int, int]]) -> Iterator[Kernel]:
    """The kernels in the output of `ptxas -v`, in order; `resources` are (shared memory, threads) of the kernels as they were traced."""
    pattern = (
        r"Compiling entry function '(?P<name>\w+)' for .*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    )
    for index, match in enumerate(re.finditer(pattern, text, re.DOTALL)):
        registers = int(match["registers"])
        shared_memory, threads = resources[min(index, len(resources) - 1)] if resources else (0, WARPGROUP)
        blocks = min(
            REGISTERS // (-(-registers // 8) * 8 * threads),
            SHARED_MEMORY // (shared_memory + RESERVED) if shared_memory <= SHARED_MEMORY else 0,
            THREADS // threads,
        )
        name = match["name"].removesuffix("_mosaic_gpu_kernel")
        yield Kernel(name, registers, int(match["stores"]), int(match["loads"]), int(match["stack"]), shared_memory, threads, blocks)


def block_resources(jaxpr) -> Iterator[tuple[int, int]]:
    """Shared memory (bytes) and threads of every Mosaic GPU kernel in a program, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "mpmd_map":
            mesh = equation.params["meshes"][0]
            yield shared_memory(equation.params["jaxprs"][0]), WARPGROUP * (getattr(mesh, "num_threads", None) or 1)
        else:
            for inner in inner_jaxprs(equation):
                yield from block_resources(inner)


def shared_memory(jaxpr) -> int:
    """Bytes of the shared memory that scopes in a kernel allocate, the largest of scopes that do not overlap; barriers take 8."""
    largest = 0
    for equation in jaxpr.eqns:
        own = 0
        inner = [*inner_jaxprs(equation)]
        if equation.primitive.name == "run_scoped":
            for variable in inner[0].invars:
                space = str(getattr(variable.aval, "memory_space", "")).lower()
                if "smem" in space:
                    aval = variable.aval.inner_aval
                    size = getattr(aval.dtype, "itemsize", 8) if "barrier" not in str(aval.dtype).lower() else 8
                    own += -(-math.prod(aval.shape) * size // 1024) * 1024 if size != 8 else 8 * math.prod(aval.shape)
        largest = max(largest, own + max((shared_memory(x) for x in inner), default=0))
    return largest


def inner_jaxprs(equation) -> Iterator:
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


@contextlib.contextmanager
def captured_output() -> Iterator[list[str]]:
    """Collects what is written to the process' standard output and error, by C++ too; the list yielded holds it after the block."""
    collected: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        saved = [os.dup(descriptor) for descriptor in (1, 2)]
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield collected
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            file.seek(0)
            collected.append(file.read().decode(errors="replace"))


def versions() -> dict[str, str]:
    found = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "libtpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def gpu_table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: kernels of compiled cases."""
    lines = [
        "| operation | case | registers | spills | shared memory, KiB | blocks an SM | temp, MiB | s |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for outcome in outcomes:
        for kernel in outcome.kernels:
            lines.append(
                f"| {outcome.operation} | {outcome.case} | {kernel.registers} | {kernel.spill_stores + kernel.spill_loads} "
                f"| {kernel.shared_memory / 1024:.0f} | {kernel.blocks} | {(outcome.temp or 0) / 2**20:.1f} | {outcome.seconds:.1f} |"
            )
    return "\n".join(lines)


def compiled_table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: cases that compiled to something ptxas does not see."""
    lines = ["| target | operation | implementation | case | temp, MiB | s |", "|---|---|---|---|--:|--:|"]
    for outcome in outcomes:
        row = (outcome.target, outcome.operation, outcome.implementation, outcome.case, f"{(outcome.temp or 0) / 2**20:.1f}")
        lines.append(f"| {' | '.join(row)} | {outcome.seconds:.1f} |")
    return "\n".join(lines)


def report(outcomes: Sequence[Outcome], listed: int) -> str:
    """The record as a page; `listed` cases there are in all."""
    failed = [outcome for outcome in outcomes if outcome.error]
    passed = [outcome for outcome in outcomes if not outcome.error]
    parts = [
        "# Kernels compiled for devices that were not there",
        f"{len(passed)} of {listed} cases compiled as they should, {len(failed)} failed, {listed - len(outcomes)} were not tried; "
        "nothing was run. Versions: "
        + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
    ]  # fmt: skip
    if failed:
        parts += ["## Failed", "\n".join(f"- {x.target}, {x.operation}, {x.implementation}, {x.case}: {x.error}" for x in failed)]
    if on_gpu := [outcome for outcome in passed if outcome.kernels]:
        parts += ["## GPU kernels, as ptxas reports them", gpu_table(on_gpu)]
    if others := [outcome for outcome in passed if not outcome.kernels]:
        parts += ["## TPU kernels, and what XLA makes of the rest", compiled_table(others)]
    return "\n\n".join(parts) + "\n"


def key(outcome: Outcome) -> tuple[str, ...]:
    return outcome.target, outcome.operation, outcome.implementation, outcome.case


def read_records(folder: pathlib.Path | None, listed: dict[str, list[Case]]) -> dict[tuple[str, ...], Outcome]:
    """What earlier runs found of cases that are still listed, with this code and these compilers."""
    if folder is None or not (folder / "records.jsonl").exists():
        return {}
    names = {(operation, case.implementation, case.name) for operation, cases in listed.items() for case in cases}
    found = {}
    for text in (folder / "records.jsonl").read_text("utf-8").splitlines():
        record = json.loads(text)
        if record.pop("versions") != versions() or record.get("source") != source_of(record["operation"]):
            continue
        outcome = Outcome(**record | {"kernels": tuple(Kernel(**kernel) for kernel in record["kernels"])})
        if key(outcome)[1:] in names:
            found[key(outcome)] = outcome
    return found


def write_records(folder: pathlib.Path | None, found: dict[tuple[str, ...], Outcome], listed: int) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [found[at] for at in sorted(found)]
    records = (dumps(dataclasses.asdict(outcome) | {"versions": versions()}) for outcome in outcomes)
    replace(folder / "records.jsonl", "\n".join(records) + "\n")
    replace(folder / "aot.md", report(outcomes, listed))


def find_compilers() -> None:
    """Puts the ptxas of the Python package on the path, behind one that is there already."""
    for base in sys.path:
        for folder in pathlib.Path(base or ".").glob("nvidia/cu*/bin"):
            os.environ["PATH"] += os.pathsep + str(folder)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Compiles every kernel for devices that are not here.")
    parser.add_argument("--quick", action="store_true", help="the short list, for CI")
    parser.add_argument("--targets", default=",".join(targets.TARGETS), help="of " + ", ".join(targets.TARGETS))
    parser.add_argument("--operations", default="", help="only these, comma-separated")
    parser.add_argument("--match", default="", help="only cases whose name this regular expression finds")
    parser.add_argument("--again", action="store_true", help="compile what is recorded, too")
    parser.add_argument("--output_dir", default=None, help="where records go; default experiments/results/aot, with --quick nowhere")
    args = parser.parse_args(argv)
    find_compilers()
    try:
        chosen = [targets.by_name(name) for name in args.targets.split(",")]
    except TargetError as error:
        print(error, file=sys.stderr)
        return 2
    listed = operations()
    output = pathlib.Path(args.output_dir) if args.output_dir else (None if args.quick else RESULTS)
    kept = read_records(output, listed)
    every = sum(runs_on(case, target) for cases in listed.values() for case in cases for target in targets.TARGETS)
    outcomes: list[Outcome] = []
    seen: dict[int, tuple[Kernel, ...]] = {}
    for operation, cases in listed.items():
        if args.operations and operation not in args.operations.split(","):
            continue
        for target in chosen:
            for case in cases:
                if not runs_on(case, target.name) or (args.quick and not case.quick) or not re.search(args.match, case.name):
                    continue
                before = kept.get((target.name, operation, case.implementation, case.name))
                if before is not None and before.error is None and not args.again:
                    outcomes.append(before)
                    continue
                outcomes.append(compile_case(operation, case, target, seen))
                print(line(outcomes[-1]), flush=True)
                kept[key(outcomes[-1])] = outcomes[-1]
                write_records(output, kept, every)
    failed = sum(outcome.error is not None for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} cases compiled as they should")
    return 1 if failed or not outcomes else 0


def line(outcome: Outcome) -> str:
    head = f"{outcome.target:5} {outcome.operation:18} {outcome.implementation:10} {outcome.case:58}"
    if outcome.error:
        return f"{head} FAILED: {outcome.error}"
    kernels = "  ".join(f"{k.registers} registers, {k.shared_memory >> 10} KiB, {k.blocks} blocks" for k in outcome.kernels)
    return f"{head} {kernels:36} {(outcome.temp or 0) / 2**20:7.1f} MiB temp {outcome.seconds:5.1f} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
