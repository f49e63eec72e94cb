"""Teacher-forced quality of strategies on recall documents: what the InfiniGen studies measure, record and compare.

Every strategy reads the same documents: facts at even depths of a text, then all questions with their true answers, token by token. Nothing
is timed. Where the pool stands makes no difference to what is read (tests/cache), so it is device memory here.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Float, Int
from rich.console import Console

import kvjax
from kvjax.cache import Decode, DenseStore, Full, HostStore, InfiniGen, KVState, Ledger, OracleTopK, Policy, Strategy, ledger, tokens
from kvjax.calibrate import Calibration, calibrate, prepare
from kvjax.engine import offline
from kvjax.generation import apply, run_prefill
from kvjax.models import Decoder, Model
from kvjax.quality import fidelity, recall
from kvjax.quality.speculation import MEASURES, Audit, Audited, Speculation
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


def strategy_of(policy: Policy, offloaded: bool = False) -> Strategy:
    """The policy in its store; a host store has its pool in device memory."""
    return Strategy(policy, HostStore("device") if offloaded or policy.home == "host" else DenseStore())


@dataclasses.dataclass(frozen=True)
class Fed:
    """A batch, fed: the logits that predict every token behind the prompt, the state after the last, what the audit of guesses found."""

    logits: Float[jax.Array, "B T V"]
    kv: KVState
    found: dict[int, Mapping[str, jax.Array]]


class Bench:
    """Measures strategies on the documents of one setting. What takes time is made when it is first needed."""

    def __init__(self, settings: Settings, model: Model | None = None):
        self.settings = settings
        self._model = model
        self._calibration: Calibration | None = None
        self._workload: offline.Workload | None = None
        self._reference: list[jax.Array] = []
        self._prompts: tuple[Strategy, list[tuple[jax.Array, KVState]]] | None = None

    @property
    def model(self) -> Model:
        if self._model is None:
            self._model = kvjax.load_model(self.settings.model)
        return self._model

    @property
    def workload(self) -> offline.Workload:
        if self._workload is None:
            s = self.settings
            self._workload = offline.make_workload(self.model, s.num_prompts, s.input_len, s.seed, s.num_facts)
            if not self._workload.tests:
                raise kvjax.InputError(f"model {s.model} reads no bytes, so it cannot be asked for facts")
        return self._workload

    def measure(self, strategy: Strategy) -> Record:
        """The flat record of a strategy on all documents."""
        if not self._reference:
            self._reference = [fed.logits for fed in self._forced(strategy_of(Full()))]
        parts, hits, books, audits = [], [], [], []
        for index, ((where, rows, real), fed) in enumerate(zip(self._batches(), self._forced(strategy), strict=True)):
            books.append(ledger(strategy, fed.kv))
            audits.append(jax.tree.map(lambda x: np.asarray(x).T[:real], fed.found))  # noqa: B023
            targets = rows[:, self.settings.prompt_len :]
            parts.append([np.asarray(x)[:real] for x in fidelity.compare(self._reference[index], fed.logits, targets)])
            asked = np.asarray(fed.logits[:, -self.workload.continuation.shape[1] :])
            hits += [_by_depth(test, recall.answered(asked[i], test)) for i, test in enumerate(self.workload.tests[where])]
        quality = fidelity.Comparison(*(np.concatenate(x) for x in zip(*parts, strict=True))).summary()
        answered = np.stack(hits)
        depths = sorted(round(float(d), 4) for d in self.workload.tests[0].depths)
        return {
            **setting(),
            "settings": dataclasses.asdict(self.settings),
            "model_id": self.model.config.name,
            "dtype": str(self.model.dtype),
            "strategy": strategy.describe(),
            "store": strategy.store.name,
            **{f"fidelity_{name}": estimate.value for name, estimate in quality.items()},
            **{f"fidelity_{name}_se": estimate.error for name, estimate in quality.items()},
            "task_recall": float(answered.mean()),
            **{f"task_recall_depth_{depth:g}": float(share) for depth, share in zip(depths, answered.mean(0), strict=True)},
            "depths": depths,
            "answered": ["".join("01"[int(hit)] for hit in row) for row in answered],
            **self._shares(strategy, books),
            **_speculation(audits),
        }

    def _batches(self) -> Iterator[tuple[slice, Int[np.ndarray, "B S"], int]]:
        return offline.batches(self.workload, self.settings.batch_size)

    def _guided(self, strategy: Strategy) -> Model:
        policy: Any = strategy.policy
        if not policy.speculates:
            return self.model
        if self._calibration is None:
            self._calibration = calibrate(self.model)
        return prepare(self.model, self._calibration, partial=policy.partial, columns=policy.columns, skew=policy.skew)

    def _forced(self, strategy: Strategy) -> Iterator["Fed"]:
        """Batch by batch, all that comes behind the prompt."""
        model, start = self._guided(strategy), self.settings.prompt_len
        for (_, rows, _), (first, kv) in zip(self._batches(), self._prefilled(model, strategy), strict=True):
            following, kv, found = _fed(model.decoder, strategy, model.params, kv, jnp.asarray(rows[:, start:], jnp.int32))
            yield Fed(jnp.concatenate([first[:, None], following[:, :-1]], axis=1), kv, found)

    def _prefilled(self, model: Model, strategy: Strategy) -> list[tuple[jax.Array, KVState]]:
        """Batch by batch, the logits behind the prompt and the state. Strategies that differ in what they read alone share them."""
        twin = _prompt_twin(strategy)
        if self._prompts is None or self._prompts[0] != twin:
            self._prompts = None  # only ever one in memory
            start, made = self.settings.prompt_len, []
            for _, rows, _ in self._batches():
                lengths = np.full(len(rows), start, np.int32)
                made.append(run_prefill(model, twin, rows[:, :start], lengths, rows.shape[1] - start))
            self._prompts = (twin, made)
        return self._prompts[1]

    def _shares(self, strategy: Strategy, books: Sequence[Ledger]) -> Record:
        """How much of what is held a decode step reads, and of a host store, brings over: means over layers, steps and batches."""
        if not isinstance(strategy.store, HostStore):
            read = float(np.mean([b.kept_fraction for b in books]))
            if isinstance(strategy.policy, OracleTopK):
                total = self.settings.input_len + self.workload.continuation.shape[1]
                read = tokens(strategy.policy.k, self.settings.prompt_len) / total
            return {"read_fraction": read}
        fetched, wanted = (np.mean([getattr(b, name) for b in books], axis=0) for name in ("fetched", "wanted"))
        found: Record = {"read_fraction": float(wanted.mean()), "kv_fetched_fraction": float(fetched.mean())}
        found |= {"kv_wanted_fraction": float(wanted.mean())}
        found |= {f"kv_fetched_fraction_layer_{i}": float(x) for i, x in enumerate(fetched)}
        found |= {f"kv_wanted_fraction_layer_{i}": float(x) for i, x in enumerate(wanted)}
        if strategy.policy.speculates:
            above = strategy.policy.full_layers
            found["kv_fetched_fraction_speculating"] = float(fetched[above:].mean())
            found["kv_wanted_fraction_speculating"] = float(wanted[above:].mean())
        return found


def _prompt_twin(strategy: Strategy) -> Strategy:
    """A strategy that does the same to a prompt."""
    policy = strategy.policy
    if isinstance(policy, InfiniGen):
        plain = InfiniGen()
        policy = dataclasses.replace(policy, alpha=plain.alpha, budget=plain.budget, count=plain.count, group=plain.group)
    if isinstance(policy, OracleTopK):
        policy = OracleTopK()
    return Strategy(policy, strategy.store)


@partial(jax.jit, static_argnums=(0, 1))
def _fed(decoder: Decoder, strategy: Strategy, params, kv: KVState, fed: Int[jax.Array, "B T"]):
    """The tokens one by one, whatever is predicted.

    Returns the logits after each, the state, and what the audit of the guesses found: by layer and measure, [T, B].
    """
    step = Decode(jnp.ones(fed.shape[0], bool), strategy)

    def one(kv, token):
        if not strategy.policy.speculates:
            logits, kv = apply(decoder, params, token[:, None], kv, step)
            return kv, (logits[:, 0], {})
        audited: Any = decoder.apply(params, token[:, None], Audited(kv, {}), Audit(step))
        logits, state = audited
        return state.kv, (logits[:, 0], state.found)

    kv, (logits, found) = jax.lax.scan(one, kv, fed.T)
    return logits.swapaxes(0, 1), kv, found


def _speculation(audits: Sequence[dict[int, Mapping[str, np.ndarray]]]) -> Record:
    """Keys of the audit, over all batches; none for a policy that does not guess. `audits`: by layer and measure, [R, T]."""
    layers = tuple(audits[0])
    if not layers:
        return {}
    values = {name: np.stack([np.concatenate([found[i][name] for found in audits]) for i in layers]) for name in MEASURES}
    return Speculation(layers, values).record()


def _by_depth(test: recall.RecallTest, hit: np.ndarray) -> np.ndarray:
    """What was answered, the shallowest fact first."""
    return hit[np.argsort(test.depths)]


# -------------------------------------------------------------------------------------------------------------------------------- records


def collect(cases: Sequence[tuple[Bench, Strategy]], path: pathlib.Path, console: Console) -> list[Record]:
    """The record of every case, in order; what `path` does not hold yet is measured and added to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_text().endswith("\n"):
        path.write_text("".join(json.dumps(r) + "\n" for r in read(path)))  # the last record was cut short
    found = {_key(r["settings"], r["strategy"]): r for r in read(path)}
    wanted = [(_key(dataclasses.asdict(bench.settings), strategy.describe()), bench, strategy) for bench, strategy in cases]
    missing = {key: (bench, strategy) for key, bench, strategy in wanted if key not in found}
    began = time.perf_counter()
    for done, (key, (bench, strategy)) in enumerate(missing.items(), 1):
        record = bench.measure(strategy)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
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
    for line in path.read_text().splitlines():
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
