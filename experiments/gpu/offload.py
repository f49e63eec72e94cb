"""InfiniGen beside the full offload on the card, by experiments.infinigen.offload in a process of its own; and what its records answer."""

import json
import os
import subprocess
import sys
from functools import partial

from experiments.gpu.book import Book, Record
from kvjax.files import replace

MODEL, BATCH, CONTEXT = "opt-13b", 8, 2048
TIMEOUT_SECONDS = 590


def perform(book: Book, dry_run: bool) -> None:
    """Runs the experiment; one that was cut short finds its programs compiled when it is run again."""
    case = "kvjax-1m" if dry_run else f"{MODEL} b{BATCH} c{CONTEXT}"
    book.drop([case])
    record = book.run(case, partial(_run, book, dry_run))
    replace(book.directory / "offload.md", _markdown(record, dry_run))


def _run(book: Book, dry_run: bool) -> Record:
    where = book.directory / "offload"
    command = [sys.executable, "-m", "experiments.infinigen.offload", f"--output_dir={where}", f"--trace_dir={book.directory / 'trace'}"]
    command += ["--quick", "--model=kvjax-1m", "--transfers=jit"] if dry_run else ["--random_weights", f"--model={MODEL}"]
    command += [] if dry_run else [f"--batch_size={BATCH}", f"--context={CONTEXT}"]
    left_out = () if dry_run else ("JAX_PLATFORMS",)
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(book.directory / "compiled"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split())[-400:] or f"exit status {done.returncode}")
    entries = [json.loads(line) for line in (where / "records.jsonl").read_text("utf-8").splitlines()]
    kept = ("entry", "role", "transfer", "median_seconds", "fetch_hidden_fraction", "bytes_moved_per_step", "failure", "device_kind")
    found = [{key: entry.get(key) for key in kept} for entry in entries]
    return {"entries": found, "answer": _told(found)}


def _told(entries: list[Record]) -> str:
    """Which way to bring tokens over takes least, and what is hidden."""
    timed = [e for e in entries if e["role"] == "infinigen" and e["median_seconds"] is not None]
    parts = []
    for entry in sorted(timed, key=lambda e: e["median_seconds"]):
        hidden = entry["fetch_hidden_fraction"]
        parts.append(f"{entry['transfer']}: {1e3 * entry['median_seconds']:.2f} ms" + ("" if hidden is None else f", {hidden:.0%} hidden"))
    return "InfiniGen by transfer: " + ("; ".join(parts) or "none ran")


def _markdown(record: Record | None, dry_run: bool) -> str:
    told = "not run: the time was over" if record is None else record.get("answer") or f"failed: {record['failure']}"
    note = "A dry run: the times mean nothing. " if dry_run else ""
    return f"# Offload\n\n{note}{told}.\n\nTable and figure: offload/offload.md.\n"
