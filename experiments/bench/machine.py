"""The machine under the benchmark: what it is, who else is using it, and how fast it copies and multiplies."""

import os
import pathlib
import platform
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.timing import Sample

_PROC = pathlib.Path("/proc")
_DISTURBED_CORES = 0.15
_TICKS_OF_GRACE = 2  # /proc/stat counts whole ticks, per processor
_COPIES = 3
_LEAST_COPY_BYTES = 128 << 20
_MATRIX = 2048


def cpu_model() -> str:
    """The processor as /proc/cpuinfo names it, with family, model, processors and last-level cache."""
    try:
        lines = (_PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    widest = next((width for width in ("avx512f", "avx2", "avx") if width in fields.get("flags", "").split()), "no AVX")
    which = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{name} ({which}, {os.cpu_count()} cores, {widest}, {last_level_cache() >> 20} MiB L3)"


def last_level_cache() -> int:
    """Bytes of the largest cache of processor 0; 32 MiB where the system does not say."""
    sizes = []
    for file in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes, default=32 << 20)


class Watch:
    """Sees, over a `with` block, how much processor time went to the timed process and how much elsewhere.

    Every process counts as another one but the timed one: an idle worker whose threads spin shows up like a stranger's program. Processor
    time is read per process with the resolution of its clock (nanoseconds); processes too short-lived to be seen twice, and time the
    hypervisor took, come from /proc/stat, which counts ticks of 10 ms.

    Attributes:
      seconds: wall time of the block.
      cores: processor time of the timed process over wall time.
      others: name and cores of every other process that used any.
      disturbance: one line on who took more than 15 % of a core, or None.
    """

    def __init__(self, timed: int):
        self.timed = timed
        self.seconds = self.cores = 0.0
        self.others: dict[str, float] = {}
        self.disturbance: str | None = None

    def __enter__(self) -> "Watch":
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        (start, used, busy, stolen), (end, used_after, busy_after, stolen_after) = self._before, self._now()
        self.seconds = end - start
        spent = {pid: seconds - used.get(pid, 0.0) for pid, seconds in used_after.items()}
        self.cores = spent.pop(self.timed, 0.0) / self.seconds
        self.others = {f"{_command(pid)} ({pid})": s / self.seconds for pid, s in spent.items() if s > 1e-3 * self.seconds}
        tick = 1 / os.sysconf("SC_CLK_TCK")
        grace = _TICKS_OF_GRACE * (os.cpu_count() or 1) * tick / self.seconds
        self.others["processes that came and went"] = (busy_after - busy) / self.seconds - self.cores - sum(self.others.values()) - grace
        self.others["the hypervisor (steal)"] = (stolen_after - stolen - tick) / self.seconds
        name, most = max(self.others.items(), key=lambda item: item[1])
        self.disturbance = f"{name}: {100 * most:.0f} % of a core" if most > _DISTURBED_CORES else None

    @staticmethod
    def _now() -> tuple[float, dict[int, float], float, float]:
        busy, stolen = _system_seconds()
        return time.perf_counter(), _process_seconds(), busy, stolen


def _process_seconds() -> dict[int, float]:
    """Processor time of every process, in seconds, all threads together."""
    found = {}
    for name in os.listdir(_PROC):
        if name.isdigit():
            try:
                found[int(name)] = time.clock_gettime(~int(name) << 3 | 2)  # Linux's clock id of another process's processor time
            except OSError:  # it has ended meanwhile
                continue
    return found


def _system_seconds() -> tuple[float, float]:
    """Processor time of everything, and time stolen by the hypervisor, in seconds since boot."""
    user, nice, system, _, _, irq, softirq, steal = (int(x) for x in (_PROC / "stat").read_text().split(None, 9)[1:9])
    tick = 1 / os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) * tick, steal * tick


def _command(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return "ended"


class CopyProbe:
    """Copies between arrays several times larger than the last-level cache, with a thread per core. A sample is seconds per byte moved."""

    name = "copy"

    def __init__(self, threads: int):
        self.pid = os.getpid()
        size = max(_LEAST_COPY_BYTES, 4 * last_level_cache()) // 4 // threads * threads
        source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
        self._pairs = list(zip(np.split(target, threads), np.split(source, threads), strict=True))
        self._pool = ThreadPoolExecutor(threads)
        self._bytes = 2 * source.nbytes * _COPIES

    def prepare(self) -> None:
        return

    def sample(self) -> Sample:
        began = time.perf_counter()
        for _ in range(_COPIES):
            list(self._pool.map(lambda pair: np.copyto(*pair), self._pairs))
        return Sample((time.perf_counter() - began) / self._bytes)


class MatmulProbe:
    """A float32 matrix product of order 2048 in JAX. A sample is seconds per operation."""

    name = "matmul"

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._x = jax.random.normal(jax.random.key(0), (_MATRIX, _MATRIX), jnp.float32)
        self._product = jax.jit(lambda a, b: a @ b)

    def prepare(self) -> None:
        return

    def sample(self) -> Sample:
        began = time.perf_counter()
        self._product(self._x, self._x).block_until_ready()
        return Sample((time.perf_counter() - began) / (2 * _MATRIX**3))
