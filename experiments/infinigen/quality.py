"""Teacher-forced quality of strategies on recall documents: what the InfiniGen studies measure, record and compare.

The measuring is kvjax.quality.forced; here are the settings of the studies, their records and their intervals.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float
from rich.console import Console

import kvjax
from kvjax.cache import Strategy
from kvjax.calibrate import Calibration, calibrate, calibrated
from kvjax.engine import offline
from kvjax.files import dumps, json_lines, replace
from kvjax.models import Model
from kvjax.quality.forced import Forced
from kvjax.quality.forced import strategy_of as strategy_of
from kvjax.report.record import setting

Record = dict[str, Any]
RESAMPLES = 4000
Z = 1.96
"""Of a 95 % interval."""


def define_flags(output_dir: str, num_prompts: int) -> None:
    """Called once, when a study is the program."""
    flags.DEFINE_string("model", "kvjax-4m", "The model; one with a byte tokenizer.")
    flags.DEFINE_integer("num_prompts", num_prompts, "Documents.", lower_bound=2)
    flags.DEFINE_integer("input_len", 952, "Tokens per document.", lower_bound=72)
    flags.DEFINE_integer("num_facts", 8, "Facts per document.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 24, "Documents per batch.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the documents.")
    flags.DEFINE_bool("quick", False, "Four documents of 256 tokens, into runs/quick: whether the study runs, and nothing more.")
    flags.DEFINE_string("output_dir", output_dir, "Where records, tables and figures go.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The documents. What is recorded under other settings is measured again.

    Attributes:
      prefilled: tokens of a document that go in as a prompt; the rest is fed one by one, as the questions are. None: all of them.
    """

    model: str
    num_prompts: int
    input_len: int
    num_facts: int
    batch_size: int
    seed: int
    prefilled: int | None = None

    @property
    def prompt_len(self) -> int:
        return self.prefilled or self.input_len


def settings() -> tuple[Settings, pathlib.Path]:
    """What the flags ask for, and the directory for the results."""
    values = flags.FLAGS
    chosen = Settings(values.model, values.num_prompts, values.input_len, values.num_facts, values.batch_size, values.seed)
    directory = pathlib.Path(values.output_dir)
    if values.quick:
        chosen = dataclasses.replace(chosen, num_prompts=4, input_len=256, batch_size=4)
        if not values["output_dir"].present:
            directory = pathlib.Path("runs/quick") / directory.name
    return chosen, directory


class Bench:
    """Measures strategies on the documents of one setting. What takes time is made when it is first needed."""

    def __init__(self, settings: Settings, model: Model | None = None):
        self.settings = settings
        self._model = model
        self._calibration: Calibration | None = None
        self._forced: Forced | None = None

    @property
    def model(self) -> Model:
        if self._model is None:
            self._model = kvjax.load_model(self.settings.model)
        return self._model

    def measure(self, strategy: Strategy) -> Record:
        """The flat record of a strategy on all documents."""
        if self._forced is None:
            s = self.settings
            workload = offline.make_workload(self.model, s.num_prompts, s.input_len, s.seed, s.num_facts)
            self._forced = Forced(self._guided, workload, s.batch_size, s.prefilled)
        found = self._forced.measure(strategy)
        del found["samples"]
        return {
            **setting(),
            "settings": dataclasses.asdict(self.settings),
            "model_id": self.model.config.name,
            "dtype": str(self.model.dtype),
            "strategy": strategy.describe(),
            "store": strategy.store.name,
            **found,
        }

    def _guided(self, strategy: Strategy) -> Model:
        if strategy.policy.guesses and self._calibration is None:
            self._calibration = calibrate(self.model)
        return calibrated(self.model, strategy, self._calibration)


# -------------------------------------------------------------------------------------------------------------------------------- records


def collect(cases: Sequence[tuple[Bench, Strategy]], path: pathlib.Path, console: Console) -> list[Record]:
    """The record of every case, in order; what `path` does not hold yet is measured and added to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_text("utf-8").endswith("\n"):
        replace(path, json_lines(read(path)))  # the last record was cut short
    found = {_key(r["settings"], r["strategy"]): r for r in read(path)}
    wanted = [(_key(dataclasses.asdict(bench.settings), strategy.describe()), bench, strategy) for bench, strategy in cases]
    missing = {key: (bench, strategy) for key, bench, strategy in wanted if key not in found}
    began = time.perf_counter()
    for done, (key, (bench, strategy)) in enumerate(missing.items(), 1):
        record = bench.measure(strategy)
        with path.open("a", encoding="utf-8") as file:
            file.write(dumps(record) + "\n")
        found[key] = record
        spent = time.perf_counter() - began
        left = spent / done * (len(missing) - done)
        console.print(
            f"{strategy.describe()}: recall {record['task_recall']:.3f}, KLD {record['fidelity_kld_mean']:.4f}, reads "
            f"{record['read_fraction']:.3f} ({done} of {len(missing)}, {spent:.0f} s, about {left:.0f} s left)",
            highlight=False,
        )
    return [found[key] for key, _, _ in wanted]


def read(path: pathlib.Path) -> list[Record]:
    """What a file of JSON lines holds; a last line that was cut short is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text("utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _key(settings: Record, strategy: str) -> str:
    return json.dumps([settings, strategy], sort_keys=True)


# ------------------------------------------------------------------------------------------------------------------------------ intervals


def answers(record: Record) -> np.ndarray:
    """What was answered, 0 or 1: [documents, depths]."""
    return np.array([[int(hit) for hit in row] for row in record["answered"]])


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval (Wilson's) of a share, `right` of `count` independent trials."""
    share, spread = right / count, Z * Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def recall_interval(record: Record) -> tuple[float, float]:
    """The 95 % interval of the recall over all depths: documents are resampled, since questions about one are not independent."""
    return _resampled(answers(record).mean(1)[:, None], lambda means: means[:, 0])


def kept_share(record: Record, full: Record) -> tuple[float, float, float]:
    """Recall over that of the full cache on the same documents, with its 95 % interval (documents resampled, both together)."""
    both = np.stack([answers(record).mean(1), answers(full).mean(1)], axis=1)
    low, high = _resampled(both, lambda means: means[:, 0] / np.maximum(means[:, 1], 1e-9))
    return float(both[:, 0].mean() / max(both[:, 1].mean(), 1e-9)), low, high


def _resampled(rows: Float[np.ndarray, "R n"], statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """2.5 % and 97.5 % of a statistic of the means of resampled rows."""
    drawn = np.random.default_rng(0).integers(0, len(rows), (RESAMPLES, len(rows)))
    low, high = np.percentile(statistic(rows[drawn].mean(1)), [2.5, 97.5])
    return float(low), float(high)
