"""Quality alone, teacher-forced: cheaper than kvjax.engine.offline, because nothing is timed and prompts are shared.

Every strategy reads the same documents: facts at even depths of a text, then all questions with their true answers, token by token. Where
the pool of a host store stands makes no difference to what is read (tests/cache), so it is device memory here. Strategies that do the same
to a prompt, and differ in what they read of it, share its prefill.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kvjax.cache import Full, KVState, Ledger, Policy, Strategy, dense, host, ledger
from kvjax.engine import offline
from kvjax.errors import InputError
from kvjax.generation import feed, run_prefill
from kvjax.models import Model
from kvjax.quality import fidelity, recall
from kvjax.quality.speculation import MEASURES, Speculation, audited_feed

Guided = Callable[[Strategy], Model]
"""The model as a strategy needs it (kvjax.calibrate)."""


def strategy_of(policy: Policy, offloaded: bool = False) -> Strategy:
    """The policy in its store; a host store has its pool in device memory."""
    return Strategy(policy, host("device") if offloaded or policy.fetches else dense())


@dataclasses.dataclass(frozen=True)
class Fed:
    """A batch, fed: the logits that predict every token behind the prompt, the state after the last, what the audit of guesses found."""

    logits: Float[jax.Array, "B T V"]
    kv: KVState
    found: dict[int, Mapping[str, jax.Array]]


class Forced:
    """Measures strategies on the documents of one workload. What takes time is made when it is first needed.

    Attributes:
      start: tokens of a document that go in as a prompt; the rest is fed one by one, as the questions are.
    """

    def __init__(self, guided: Guided, workload: offline.Workload, batch_size: int, prefilled: int | None = None):
        """`prefilled`: `start`; None: the whole document. Raises InputError for a workload that asks nothing."""
        if not workload.tests:
            raise InputError("a model that reads no bytes cannot be asked for facts; measure its quality with kvjax.engine.offline")
        self.guided, self.workload, self.batch_size = guided, workload, batch_size
        self.start = prefilled or workload.prompts.shape[1]
        self._reference: list[jax.Array] = []
        self._prompts: tuple[Strategy, list[tuple[jax.Array, KVState]]] | None = None

    def measure(self, strategy: Strategy) -> dict[str, Any]:
        """What a strategy loses on all documents, and how much it reads.

        Keys of records (`fidelity_*`, `task_*`, `speculation_*`, shares of what is read), `depths` and `answered` (per document, a 0 or 1
        for every depth, as text), and `samples`: a list per prompt of `recall`, `kld` and `nll_delta`.
        """
        if not self._reference:
            self._reference = [fed.logits for fed in self._forced(strategy_of(Full()))]
        parts, hits, books, audits = [], [], [], []
        for index, ((where, rows, real), fed) in enumerate(zip(self._batches(), self._forced(strategy), strict=True)):
            books.append(ledger(strategy, fed.kv))
            audits.append(jax.tree.map(lambda x: np.asarray(x).T[:real], fed.found))  # noqa: B023
            targets = rows[:, self.start :]
            parts.append([np.asarray(x)[:real] for x in fidelity.compare(self._reference[index], fed.logits, targets)])
            asked = np.asarray(fed.logits[:, -self.workload.continuation.shape[1] :])
            hits += [_by_depth(test, recall.answered(asked[i], test)) for i, test in enumerate(self.workload.tests[where])]
        compared = fidelity.Comparison(*(np.concatenate(x) for x in zip(*parts, strict=True)))
        quality = compared.summary()
        answered = np.stack(hits)
        depths = sorted(round(float(d), 4) for d in self.workload.tests[0].depths)
        return {
            **{f"fidelity_{name}": estimate.value for name, estimate in quality.items()},
            **{f"fidelity_{name}_se": estimate.error for name, estimate in quality.items()},
            "task_recall": float(answered.mean()),
            **{f"task_recall_depth_{depth:g}": float(share) for depth, share in zip(depths, answered.mean(0), strict=True)},
            "depths": depths,
            "answered": ["".join("01"[int(hit)] for hit in row) for row in answered],
            **self._shares(strategy, books),
            **_speculation(audits),
            "samples": {
                "recall": answered.mean(1).tolist(), "kld": compared.kld.mean(1).tolist(), "nll_delta": compared.nll_delta.mean(1).tolist(),
            },
        }  # fmt: skip

    def _batches(self) -> Iterator[tuple[slice, Int[np.ndarray, "B S"], int]]:
        return offline.batches(self.workload, self.batch_size)

    def _forced(self, strategy: Strategy) -> Iterator[Fed]:
        """Batch by batch, all that comes behind the prompt."""
        model = self.guided(strategy)
        for (_, rows, _), (first, kv) in zip(self._batches(), self._prefilled(model, strategy), strict=True):
            following, kv, found = fed_forced(model, strategy, kv, rows[:, self.start :])
            yield Fed(jnp.concatenate([first[:, None], following[:, :-1]], axis=1), kv, found)

    def _prefilled(self, model: Model, strategy: Strategy) -> list[tuple[jax.Array, KVState]]:
        """Batch by batch, the logits behind the prompt and the state. Strategies that differ in what they read alone share them."""
        twin = Strategy(strategy.policy.before_reading(), strategy.store)
        if self._prompts is None or self._prompts[0] != twin:
            self._prompts = None  # only ever one in memory
            made = []
            for _, rows, _ in self._batches():
                lengths = np.full(len(rows), self.start, np.int32)
                made.append(run_prefill(model, twin, rows[:, : self.start], lengths, rows.shape[1] - self.start))
            self._prompts = (twin, made)
        return self._prompts[1]

    def _shares(self, strategy: Strategy, books: Sequence[Ledger]) -> dict[str, Any]:
        """How much of what is held a decode step reads, and of a host store, brings over: means over layers, steps and batches."""
        if not strategy.store.tier.fetches:
            if strategy.policy.selects is None:
                return {"read_fraction": float(np.mean([b.kept_fraction for b in books]))}
            total = self.workload.prompts.shape[1] + self.workload.continuation.shape[1]
            return {"read_fraction": strategy.policy.most_read(self.start, total) / total}
        fetched, wanted = (np.mean([getattr(b, name) for b in books], axis=0) for name in ("fetched", "wanted"))
        found: dict[str, Any] = {"read_fraction": float(wanted.mean()), "kv_fetched_fraction": float(fetched.mean())}
        found |= {"kv_wanted_fraction": float(wanted.mean())}
        found |= {f"kv_fetched_fraction_layer_{i}": float(x) for i, x in enumerate(fetched)}
        found |= {f"kv_wanted_fraction_layer_{i}": float(x) for i, x in enumerate(wanted)}
        if strategy.policy.guesses:
            above = strategy.policy.full_layers
            found["kv_fetched_fraction_speculating"] = float(fetched[above:].mean())
            found["kv_wanted_fraction_speculating"] = float(wanted[above:].mean())
        return found


def fed_forced(model: Model, strategy: Strategy, kv: KVState, tokens: Int[np.ndarray, "B T"]):
    """The tokens one by one, whatever is predicted; `kv` stays as it is.

    Returns the logits after each, the state, and what the audit of the guesses says: by layer and measure, [T, B].
    """
    kv = jax.tree.map(jnp.copy, kv)
    if strategy.policy.guesses:
        return audited_feed(model, strategy, kv, tokens)
    return *feed(model, strategy, kv, tokens), {}


def _speculation(audits: Sequence[dict[int, Mapping[str, np.ndarray]]]) -> dict[str, Any]:
    """Keys of the audit, over all batches; none for a policy that does not guess. `audits`: by layer and measure, [R, T]."""
    layers = tuple(audits[0])
    if not layers:
        return {}
    values = {name: np.stack([np.concatenate([found[i][name] for found in audits]) for i in layers]) for name in MEASURES}
    return Speculation(layers, values).record()


def _by_depth(test: recall.RecallTest, hit: np.ndarray) -> np.ndarray:
    """What was answered, the shallowest fact first."""
    return hit[np.argsort(test.depths)]
