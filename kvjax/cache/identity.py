"""What a strategy is, as data: what records carry, what pairs and joins them, and what figures and tables go by."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvjax.cache.notation import argument, written
from kvjax.cache.policies.base import Amount
from kvjax.cache.store import STORES, Store

DEFAULT_STORE = "dense"
"""The store of a strategy that names none, unless its policy can stand in another one alone."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """A strategy as data. Two strategies are equal where their labels are.

    Attributes:
      label: the spec string; it parses to this very strategy.
      keep: the part of it that says which tokens are kept and read, without store and codec: `full` for `vllm`.
      policy: the name of the policy in a spec string.
      arguments: of the policy, those at their default too.
      store: the name of the store.
      options: of the store, those at their default too (`page_size` and `extents`, or `transfer` and `levels`).
      codec: the name of what the cache is stored as; None: as it is.
      family: what the strategy belongs to in figures, tables and pairings: an alias (`vllm`), else what the class of the policy says.
      variant: the store, where it is not the one that the family implies; None where it is.
      budget: what the policy keeps or reads in total, an int for tokens, a float for a fraction of the prompt; None where it has no limit
        or its class says nothing.
      unlimited: the policy keeps and reads every token.
    """

    label: str
    keep: str
    policy: str
    arguments: Mapping[str, Any]
    store: str
    options: Mapping[str, Any]
    codec: str | None
    family: str
    variant: str | None
    budget: Amount | None
    unlimited: bool

    def record(self) -> dict[str, Any]:
        """As an object for JSON; `of_record` reads it."""
        return dataclasses.asdict(self)


FIELDS = tuple(field.name for field in dataclasses.fields(Identity))


def of_record(found: Any) -> Identity | None:
    """The identity that `Identity.record` wrote into a JSON object; None for anything else."""
    if not isinstance(found, dict) or any(name not in found for name in FIELDS):
        return None
    texts = all(isinstance(found[name], str) for name in ("label", "keep", "policy", "store", "family"))
    objects = all(isinstance(found[name], dict) for name in ("arguments", "options"))
    optional = all(isinstance(found[name], str | None) for name in ("codec", "variant"))
    budget = isinstance(found["budget"], int | float | None) and not isinstance(found["budget"], bool)
    if not (texts and objects and optional and budget and isinstance(found["unlimited"], bool)):
        return None
    return Identity(**{name: found[name] for name in FIELDS})


def store_spec(store: Store) -> str:
    """A store in a spec string: `paged`, `paged(16)`, `host(transfer=device,levels=8)`.

    What is at its default is left out, and so is the name of the first option where it is the only one.
    """
    usual = STORES[store.name]().options
    changed = {name: value for name, value in store.options.items() if usual[name] != value}
    if changed and list(changed) == list(usual)[:1]:
        return f"{store.name}({argument(next(iter(changed.values())))})"
    return written(store.name, changed)
