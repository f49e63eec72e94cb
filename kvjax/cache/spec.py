"""Spec strings: `h2o(heavy=0.1,recent=0.1)` and the strategy it names."""

import ast
import dataclasses
import importlib
import math

from kvjax.cache.policies import POLICIES, Policy
from kvjax.cache.stores import STORES, HostStore, PagedStore
from kvjax.cache.strategy import ALIASES, Strategy
from kvjax.errors import SpecError


def parse_strategy(spec: str, store: str | None = None, page_size: int | None = None, transfer: str | None = None) -> Strategy:
    """The strategy that a spec string names: a policy, optionally with keyword arguments, optionally with its store.

    `h2o(heavy=8,recent=8)` stands in the default store, `h2o(heavy=8,recent=8)+paged` in pages; `vllm` is `full+paged` and `offload` is
    `full+host`; infinigen stands in the host store wherever others stand. A policy of your own is named by its module and class:
    `my_policies:KeyNorm(keep=64)`. An int is tokens, a float is a fraction of the prompt.

    Args:
      store: of specs that name none; the dense store by default.
      page_size: slots of a page; None: the store's default. Without meaning for other than the paged store.
      transfer: how tokens come from the host store; None: the store's default. Without meaning for other stores.

    Raises SpecError with what exists.
    """
    if store is not None and store not in STORES:
        raise SpecError(f"unknown store {store!r}; choose from {', '.join(STORES)}")
    policy, plus, own = spec.strip().rpartition("+")
    if not plus or own not in STORES:
        policy, own = spec.strip(), ""
    if policy in ALIASES:
        policy, only = ALIASES[policy]
        if (own or store or only) != only:
            raise SpecError(
                f"{spec.strip()} means {policy} in the {only} store; for {policy} in another store write {policy}+{own or store}"
            )
        own = only
    parsed = parse_policy(policy)
    chosen = STORES[own or parsed.home or store or "dense"]
    if chosen is PagedStore and page_size is not None:
        return Strategy(parsed, PagedStore(page_size))
    if chosen is HostStore and transfer is not None:
        return Strategy(parsed, HostStore(transfer))  # type: ignore[arg-type]
    return Strategy(parsed, chosen())


def parse_policy(spec: str) -> Policy:
    """The policy part of `parse_strategy`."""
    problem = SpecError(f"cannot read strategy {spec!r}; write a name, or a name with arguments like h2o(heavy=0.1,recent=0.1)")
    module, colon, call = spec.strip().rpartition(":")
    try:
        tree = ast.parse(call, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise problem from None
    arguments: dict[str, object] = {}
    if isinstance(tree, ast.Call):
        if tree.args or any(keyword.arg is None for keyword in tree.keywords):
            raise SpecError(f"strategy {spec!r}: arguments need names, like h2o(heavy=0.1,recent=0.1)")
        for keyword in tree.keywords:
            name = str(keyword.arg)
            if name in arguments:
                raise SpecError(f"strategy {spec!r} gives {name} twice")
            arguments[name] = _value(keyword.value, spec)
        tree = tree.func
    if not isinstance(tree, ast.Name):
        raise problem
    kind = _imported(module, tree.id) if colon else POLICIES.get(tree.id)
    if kind is None:
        raise SpecError(f"unknown strategy {tree.id!r}; choose from {', '.join((*POLICIES, *ALIASES))}, or name your own as module:Class")
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := [name for name in arguments if name not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
        raise SpecError(f"strategy {tree.id} has no argument {unknown[0]!r}; {takes}")
    return kind(**arguments)


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
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    return [part.strip() for part in (*parts, current) if part.strip()]


def _value(node: ast.expr, spec: str) -> object:
    """A number, a quoted or bare word, True or False."""
    if isinstance(node, ast.Name):
        return math.inf if node.id == "inf" else node.id
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise SpecError(f"strategy {spec!r}: an argument is a number, a word, True or False") from None
