"""Compiles whole decode steps and prompts for an H200 that is not here, and looks for the kernels, and for copies of the cache, inside.

    .venv-aot/bin/python -m experiments.aot_programs            every case
    .venv-aot/bin/python -m experiments.aot_programs --quick    the first of every kind, for CI
    .venv-aot/bin/python -m experiments.aot_programs --match='h2o.*decode'

Programs of two layers, as kvjax.plan compiles them, over the stores that the card computes with. One that lacks a kernel it should have, or
whose decode step copies something as large as a layer's keys, fails the run. Prints one line a case; writes nothing.

Needs the extra `aot`; exits with 1 when anything failed, with 2 where nothing can be compiled.
"""

import argparse
import dataclasses
import math
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from experiments.aot import captured_output, find_compilers
from kvjax.files import replace

# isort: split
import jax
import jax.numpy as jnp

from kvjax.cache import Prefill, Stage, parse_strategy
from kvjax.errors import KvjaxError
from kvjax.generation import unrolled_prefill, unrolled_steps
from kvjax.models import preset
from kvjax.plan import Device, Setting, open_device, programs

LAYERS, BATCH, CONTEXT, CHUNK = 2, 16, 2048, 512
Program = Literal["decode", "prefill"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One program, and the kernels it must have: in every layer, but the first ones of a policy that reads everything there."""

    model: str
    spec: str
    program: Program
    kernels: tuple[str, ...]
    layers: int = LAYERS
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} {self.spec} {self.program}"


def cases() -> Iterator[Case]:
    """Every program to compile."""
    for model in ("llama-3-8b", "opt-6.7b"):
        quick = model == "llama-3-8b"
        yield Case(model, "h2o", "decode", ("paged_attention", "h2o_evict"), quick=quick)
        yield Case(model, "h2o", "prefill", ("prefill_attention", "column_mass"), quick=quick)
        for spec in ("full", "vllm", "h2o+paged", "streaming"):
            yield Case(model, spec, "decode", ("paged_attention", "h2o_evict") if spec.startswith("h2o") else ("paged_attention",))
        yield Case(model, "vllm", "prefill", ("prefill_attention",))
        yield Case(model, "infinigen", "decode", ("paged_attention", "speculate", "gather"), layers=4)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the compiler made of a program.

    Attributes:
      kernels: calls of each kernel.
      copies: copies of something as large as the keys of a layer.
      temp: scratch, bytes.
      results: bytes that do not take the place of an argument: a cache that is not updated in place would be among them.
    """

    kernels: Counter[str]
    copies: tuple[str, ...]
    temp: int
    results: int
    seconds: float

    def complaint(self, case: Case) -> str | None:
        """What is wrong with it."""
        if missing := [name for name in case.kernels if not self.kernels[name]]:
            return f"no {', '.join(missing)}"
        if self.results > 2**20:
            return f"{self.results} bytes of results beside the arguments: the cache is not updated in place"
        if case.program == "decode" and self.copies:
            return f"copies the cache: {self.copies[0][:160]}"
        return None


def compile_case(case: Case, device: Device, text_dir: pathlib.Path | None = None) -> Outcome:
    """Compiles a case for the device and reads what came of it; its text goes to `text_dir`."""
    config = dataclasses.replace(preset(case.model), num_layers=case.layers)
    setting = Setting(config, parse_strategy(case.spec), BATCH, CONTEXT, prefill_chunk=CHUNK).native(device)
    start = time.perf_counter()
    with captured_output():  # of ptxas
        program = lowered(programs.as_compiled(setting, device), device, case.program).compile()
    text, memory = program.as_text() or "", program.memory_analysis()
    if text_dir is not None:
        text_dir.mkdir(parents=True, exist_ok=True)
        replace(text_dir / f"{case.name.replace(' ', '_')}.txt", text)
    assert memory is not None
    keys = programs.state(setting, BATCH if case.program == "decode" else setting.prefill_batch).layers[0].pool.k[0]
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    copies, seconds = tuple(copies_in(text, math.prod(keys.shape))), time.perf_counter() - start
    return Outcome(kernels_in(text), copies, memory.temp_size_in_bytes, results, seconds)


def lowered(setting: Setting, device: Device, program: Program) -> jax.stages.Lowered:
    """A decode step of the whole batch, or the last chunk of a prompt."""
    decoder, params = programs.decoder(setting), programs._params(setting)
    rows = setting.batch if program == "decode" else setting.prefill_batch
    row: Any = jax.ShapeDtypeStruct((rows,), jnp.int32)
    with device.in_scope():
        if program == "decode":
            count = jax.ShapeDtypeStruct((), jnp.int32)
            arguments = programs.placed(device, (params, programs.state(setting, rows), row, row, None, count))
            return unrolled_steps.lower(decoder, setting.strategy, (), 1, *arguments)
        kv = programs.staged(setting) if setting.stages else programs.state(setting, rows)
        strategy, how = setting.strategy, dict[str, Any](first=False, context=setting.prompt)
        staging = Stage(row, strategy.store.staging, strategy.observes, **how)
        step = staging if setting.stages else Prefill(row, strategy, **how)
        tokens = jax.ShapeDtypeStruct((rows, CHUNK), jnp.int32)
        return unrolled_prefill.lower(decoder, *programs.placed(device, (params, tokens, kv, step)))


def kernels_in(text: str) -> Counter[str]:
    """Mosaic kernels of a compiled program, by the scopes in which they were called."""
    calls = (line for line in text.splitlines() if "custom-call(" in line and "mosaic_gpu" in line)
    scopes = (re.search(r'op_name="[^"]*\b(\w+)_mosaic_gpu/', line) for line in calls)
    return Counter(found[1] for found in scopes if found)


def copies_in(text: str, elements: int) -> Iterator[str]:
    """Instructions that copy or transpose at least so many elements and are not inside a fusion's body with other work."""
    for line in text.splitlines():
        found = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]\S* (copy|transpose|fusion|copy-start)\(", line)
        if found is None or not found[2] or math.prod(map(int, found[2].split(","))) < elements:
            continue
        if found[3] != "fusion" or re.search(r"copy|transpose", found[1]):
            yield line.strip()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Compiles whole programs for an H200 that is not here.")
    parser.add_argument("--quick", action="store_true", help="the short list, for CI")
    parser.add_argument("--match", default="", help="only cases whose name this regular expression finds")
    parser.add_argument("--text_dir", default=None, help="where the compiled programs go, as text; nowhere by default")
    args = parser.parse_args(argv)
    find_compilers()
    try:
        device = open_device("h200")
    except KvjaxError as error:
        print(error, file=sys.stderr)
        return 2
    failed, chosen = 0, [case for case in cases() if re.search(args.match, case.name) and (case.quick or not args.quick)]
    for case in chosen:
        try:
            outcome = compile_case(case, device, args.text_dir and pathlib.Path(args.text_dir))
        except Exception as error:  # any refusal of any compiler is a result
            failed += 1
            print(f"{case.name:34} FAILED: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}", flush=True)
            continue
        complaint = outcome.complaint(case)
        failed += complaint is not None
        found = ", ".join(f"{count} {name}" for name, count in sorted(outcome.kernels.items()))
        end = f"FAILED: {complaint}" if complaint else f"{len(outcome.copies)} copies of a layer's keys"
        print(f"{case.name:34} {found:60} {outcome.temp / 2**20:8.1f} MiB temp {outcome.seconds:6.1f} s  {end}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} programs compiled as they should")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
