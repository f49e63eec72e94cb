"""What PyTorch's attention and transformers' generate take on the same card, each in a process of its own (torch_peer.py).

The interpreter is this one, or the one that KVJAX_PEERS_PYTHON names. This process leaves the card alone meanwhile.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from experiments.bench.peers.client import PYTHON_VARIABLE
from experiments.gpu import decode
from experiments.gpu.book import Book, Record, table
from experiments.gpu.kernels import TOY
from kvjax.files import replace
from kvjax.models.config import ModelConfig, preset
from tests.kernels import shapes

SCRIPT = pathlib.Path(__file__).with_name("torch_peer.py")
TIMEOUT_SECONDS = 400


def perform(book: Book, dry_run: bool) -> None:
    """Asks for every figure, then writes peers.md. Without torch it says so, and that is all."""
    if why := missing("torch"):
        book.console.print(f"PyTorch is left out: {why}; {PYTHON_VARIABLE} names another interpreter", highlight=False)
        return
    listed = dict(requests(dry_run))
    if why := missing("transformers"):
        book.console.print(f"transformers' generate is left out: {why}", highlight=False)
        listed = {case: request for case, request in listed.items() if request["what"] != "generate"}
    book.drop(list(listed))
    for case, request in listed.items():
        book.run(case, partial(ask, request), {"request": request})
    replace(book.directory / "peers.md", markdown(book))
    book.console.print(markdown(book), markup=False, highlight=False)


def requests(dry_run: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """By case; the shapes are those of kernels.py and decode.py."""
    yield "copy", {"what": "copy", "size": 2**20 if dry_run else 2**30}
    for at in (TOY,) if dry_run else (shapes.LLAMA_3_8B, shapes.OPT_6_7B, shapes.OPT_13B):
        shape = {"heads": at.heads, "kv_heads": at.kv_heads, "dim": at.head_dim}
        batch, context = (2, 128) if dry_run else (32, 8192)
        yield f"decode {at.name} b{batch} c{context}", {"what": "attention", "batch": batch, "queries": 1, "keys": context, **shape}
        rows, size = (1, 128) if dry_run else ((1, 8192) if at is shapes.LLAMA_3_8B else (4, 2048))
        yield f"prefill {at.name} b{rows} {size}x{size}", {"what": "attention", "batch": rows, "queries": size, "keys": size, **shape}
    for cell in decode.cells(dry_run):
        config = described(preset(cell.model))
        sizes = {"batch": cell.batch, "context": cell.context, "tokens": 4 if dry_run else 65}
        yield f"generate {cell}", {"what": "generate", "config": config, **sizes}


def described(config: ModelConfig) -> dict[str, Any]:
    """The fields of the transformers configuration of the same shape."""
    common = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers}
    common |= {"num_attention_heads": config.num_heads, "max_position_embeddings": config.max_position}
    if config.rope is None:
        return common | {"family": "opt", "ffn_dim": config.intermediate_size, "word_embed_proj_dim": config.hidden_size}
    heads = {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}
    return common | heads | {"family": "llama", "intermediate_size": config.intermediate_size}


def ask(request: dict[str, Any]) -> Record:
    """The reply to one request. Raises RuntimeError with the end of what the process wrote."""
    command = [interpreter(), str(SCRIPT), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=_environment(), check=False)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split())[-400:] or f"exit status {done.returncode}")
    found: Record = json.loads(done.stdout.splitlines()[-1])
    return found | ({"bytes_per_second": found["moved_bytes"] / found["median_seconds"]} if "moved_bytes" in found else {})


def missing(package: str) -> str | None:
    """Why the interpreter cannot import a package, or None."""
    try:
        command = [interpreter(), "-c", f"import {package}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=_environment(), check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{interpreter()} does not start: {error}"
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else None


def interpreter() -> str:
    return os.environ.get(PYTHON_VARIABLE) or sys.executable


def _environment() -> dict[str, str]:
    """This process's, off the network; without what leads another interpreter to this one's packages."""
    other = bool(os.environ.get(PYTHON_VARIABLE))
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV") if other else ()
    return {name: value for name, value in os.environ.items() if name not in left_out} | {"HF_HUB_OFFLINE": "1"}


def markdown(book: Book) -> str:
    rows = []
    for r in book.found:
        rate = f"{r['bytes_per_second'] / 1e9:.0f}" if "bytes_per_second" in r else "-"
        rows.append([r["case"], f"{1e3 * r['median_seconds']:.3f}", rate, r["torch_version"], r["peer_device"]])
    lines = ["# PyTorch and transformers", ""]
    lines += ["A dry run at toy sizes: the times mean nothing.", ""] if book.dry_run else []
    lines += [table(["case", "median (ms)", "GB/s", "torch", "on"], rows), ""]
    lines += [f"- {r['case']}: {r['failure']}" for r in book.records.values() if "failure" in r]
    return "\n".join(lines).rstrip() + "\n"
