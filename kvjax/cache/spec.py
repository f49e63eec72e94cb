"""Spec strings: `h2o(heavy=0.1,recent=0.1)+paged(16)` and the strategy it names.

    keep[+store[(options)]][+codec]

`keep` is a policy, with arguments by name, or an alias of a policy in a store; `store` is one of STORES, with the options that its class
has, of which the first may go without its name; `codec` is what the cache is stored as, one of CODECS.
"""

import dataclasses
import functools
import importlib
from typing import Any

from kvjax.cache.identity import DEFAULT_STORE, Identity
from kvjax.cache.notation import Call, read_call, split
from kvjax.cache.policies import POLICIES, Amount, Policy
from kvjax.cache.store import STORES, Store
from kvjax.cache.strategy import ALIASES, Strategy, usual_store
from kvjax.errors import KvjaxError, SpecError

CODECS: dict[str, Any] = {}
"""What a cache may be stored as, by name; there is nothing yet but the model's own numbers."""


def parse_strategy(spec: str, store: str | None = None, page_size: int | None = None, transfer: str | None = None) -> Strategy:
    """The strategy that a spec string names: a policy, optionally with keyword arguments, optionally with its store.

    `h2o(heavy=8,recent=8)` stands in the default store, `h2o(heavy=8,recent=8)+paged` in pages, `h2o(heavy=8,recent=8)+paged(16)` in pages
    of 16 slots; `vllm` is `full+paged` and `offload` is `full+host`; infinigen stands in the host store wherever others stand. A policy of
    your own is named by its module and class: `my_policies:KeyNorm(keep=64)`. An int is tokens, a float is a fraction of the prompt.

    Args:
      store: of specs that name none; the dense store by default.
      page_size: slots of a page, of specs that do not say; None: the store's default. Without meaning for other than the paged store.
      transfer: how tokens come from the host store, of specs that do not say; None: the store's default. Without meaning for other stores.

    Raises SpecError with what exists.
    """
    if store is not None and store not in STORES:
        raise SpecError(f"unknown store {store!r}; choose from {', '.join(STORES)}")
    parts = _parts(spec)
    keep, own = parts.keep, parts.store
    if keep in ALIASES:
        keep, only = ALIASES[keep]
        if (own.name if own else store or only) != only:
            other = own.text if own else store
            raise SpecError(f"{spec.strip()} means {keep} in the {only} store; for {keep} in another store write {keep}+{other}")
        own = own or read_call(only, "store")
    policy = parse_policy(keep)
    own = own or read_call(usual_store(policy, store or DEFAULT_STORE), "store")
    filled = {"page_size": page_size, "transfer": transfer}
    codec = {} if parts.codec is None else {"codec": CODECS[parts.codec]}
    return Strategy(policy, _store(own, {name: value for name, value in filled.items() if value is not None}), **codec)


def parse_policy(spec: str) -> Policy:
    """The policy part of `parse_strategy`."""
    call = read_call(spec.strip())
    if call.name in ALIASES and not call.module:
        keep, only = ALIASES[call.name]
        raise SpecError(f"strategy {spec.strip()!r}: {call.name} takes no arguments; it means {keep}+{only}, so write {keep}+{only}(...)")
    if call.values:
        raise SpecError(f"strategy {spec!r}: arguments need names, like h2o(heavy=0.1,recent=0.1)")
    kind = _imported(call.module, call.name) if call.module else POLICIES.get(call.name)
    if kind is None:
        raise SpecError(f"unknown strategy {call.name!r}; choose from {', '.join((*POLICIES, *ALIASES))}, or name your own as module:Class")
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    if unknown := [name for name in call.arguments if name not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
        raise SpecError(f"strategy {call.name} has no argument {unknown[0]!r}; {takes}")
    missing = [name for name in _needed(kind) if name not in call.arguments]
    if missing:
        raise SpecError(f"strategy {call.name} needs {', '.join(missing)}; write {call.path}({missing[0]}=...)")
    return kind(**call.arguments)


def _needed(kind: type[Policy]) -> list[str]:
    """Arguments of a policy that have no default."""
    fields = (field for field in dataclasses.fields(kind) if field.init)
    return [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]


def _imported(module: str, name: str) -> type[Policy]:
    """The policy class `name` of an importable module. Raises SpecError."""
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise SpecError(f"cannot import module {module!r} for strategy {module}:{name}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Policy) and dataclasses.is_dataclass(found)):
        raise SpecError(f"{module}:{name} is not a kvjax.Policy dataclass")
    return found


def split_specs(text: str) -> list[str]:
    """Splits `full,h2o(heavy=8,recent=8)` at the commas outside parentheses."""
    return [part for part in split(text, ",") if part]


@dataclasses.dataclass(frozen=True)
class _Parts:
    keep: str
    store: Call | None
    codec: str | None


def _parts(spec: str) -> _Parts:
    """A spec string by its parts; the store and the codec exist, the policy is not looked at. Raises SpecError."""
    keep, *beside = split(spec, "+")
    store = codec = None
    for part in beside:
        if not part:
            raise SpecError(f"strategy {spec.strip()!r} has a + with nothing behind it; write a store there ({', '.join(STORES)}), or no +")
        call = read_call(part, "store")
        if not call.module and call.name in STORES and store is None and codec is None:
            store = call
        elif not call.module and call.name in CODECS and codec is None:
            codec = call.name
        else:
            raise SpecError(_misplaced(spec.strip(), call, store is not None))
    return _Parts(keep, store, codec)


def _misplaced(spec: str, call: Call, stored: bool) -> str:
    """Why a part behind a + is none."""
    codecs = f"codecs: {', '.join(CODECS)}" if CODECS else "there is no codec yet"
    if stored and call.path in STORES:
        return f"strategy {spec!r} names two stores; write one, like h2o+paged(16)"
    if stored:
        return f"unknown codec {call.path!r} in strategy {spec!r}; {codecs}"
    return f"unknown store or codec {call.path!r} in strategy {spec!r}; stores: {', '.join(STORES)}; {codecs}"


def _store(call: Call, filled: dict[str, Any]) -> Store:
    """The store of a call.

    Args:
      filled: options for what the call leaves out; those that this store does not have are without meaning.

    Raises SpecError.
    """
    make = STORES[call.name]
    known = list(make().options)
    takes = f"it takes {', '.join(known)}" if known else "it takes no options"
    options = dict(call.arguments)
    if len(call.values) > min(len(known), 1) or (call.values and known[0] in options):
        named = f"; only the first, {known[0]}, may go without its name" if known else ""
        raise SpecError(f"cannot read store {call.text!r}: {takes}{named}")
    options |= dict(zip(known, call.values, strict=False))
    if unknown := [name for name in options if name not in known]:
        raise SpecError(f"the {call.name} store has no option {unknown[0]!r}; {takes}")
    return make(**{name: value for name, value in filled.items() if name in known} | options)


@functools.lru_cache(maxsize=4096)
def read_identity(
    spec: str, page_size: int | None = None, transfer: str | None = None, budget: Amount | None = None, asked: bool = False
) -> Identity:
    """The identity of a strategy of which a record has the spec string alone.

    The label stays as it is written, unless `page_size` or `transfer` say more than it. No module of a user's own is imported: what its
    class would say stays open, and so does everything about a text that names no strategy (any more).

    Args:
      budget: that the policy was to be given.
      asked: the text is what was asked for, such as `h2o+paged`, and not what describes a strategy: the label is what does.
    """
    label = spec.strip()
    try:
        parts = _parts(label)
        call = read_call(parts.keep)
        own = _store(parts.store or read_call(DEFAULT_STORE, "store"), {} if page_size is None else {"page_size": page_size})
    except KvjaxError:
        return Identity(label, label, label, {}, DEFAULT_STORE, {}, None, label, None, None, False)
    if not call.module:
        try:
            strategy, plain = parse_strategy(label, page_size=page_size, transfer=transfer), parse_strategy(label)
            if budget is not None:
                strategy = Strategy(strategy.policy.with_budget(budget), strategy.store)
        except KvjaxError:
            pass
        else:
            found = strategy.identity()
            if asked or budget is not None:
                return found
            keep = found.keep if parts.keep in ALIASES else parts.keep
            return dataclasses.replace(found, keep=keep, label=label if strategy == plain else found.label)
    variant = None if own.name == DEFAULT_STORE else own.name
    return Identity(
        label, parts.keep, call.path, call.arguments, own.name, own.options, parts.codec, call.path, variant, None, False
    )  # fmt: skip
