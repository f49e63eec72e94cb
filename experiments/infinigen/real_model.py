"""InfiniGen on a real language model: what each step between a guess and the truth loses, and what a token read is worth.

    python -m experiments.infinigen.real_model
    python -m experiments.infinigen.real_model --part=layers --rows=2
    python -m experiments.infinigen.real_model --part=thresholds --skip_rows=4 --rows=8 --output_dir=runs/thresholds

  layers    layer by layer, on queries, keys and attention inputs of whole rows of text: the attention that `tokens` tokens a kv head miss
            when they are chosen in several ways, from the published one to the truth. Nothing is decoded, so no layer sees what another
            has lost.
  frontier  decoded, teacher-forced: how far predictions are from the full cache's, against tokens read and bytes moved, of the published
            rule, of the steps from it to today's, and of what it competes with.
  thresholds  only when it is named: one alpha for all layers against an alpha for each, both chosen for a stated loss on the calibration's
            sample (kvjax.thresholds) and compared on the text, by tokens read for the same attention missed. And decoded with the one
            alpha: how much is missed then, and the divergence.

The text is prose (`pydoc_data.topics`), unless --text names a file; calibration sees its own sample, Python source. All parts write
records.jsonl, one line a result, and do not measure again what stands there.
"""

import dataclasses
import json
import pathlib
import pydoc_data.topics
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.infinigen.study import COLOURS
from kvjax.cache import Full, ledger, parse_strategy
from kvjax.calibrate import Calibration, calibrate, calibrated, captured, curves_of, kept_columns, with_curves
from kvjax.command import fail, parse_flags
from kvjax.errors import InputError, KvjaxError
from kvjax.files import plain
from kvjax.generation import run_prefill
from kvjax.models import Model, load_model
from kvjax.models.decoder import rope_angles, rotate
from kvjax.quality import fidelity
from kvjax.quality.forced import fed_forced, strategy_of
from kvjax.quality.speculation import MEASURES
from kvjax.thresholds import alpha_by_layer, alpha_for

FLAGS = flags.FLAGS
PARTS = ("layers", "frontier", "thresholds")
GAP = 9_000
"""Tokens between the starts of two rows."""

PAPER, STEP = "infinigen_paper(alpha=4.0,partial=0.3,budget=0.2)", "infinigen(alpha={alpha},partial={partial},budget={budget}{rest})"


def _step(alpha: float, partial: float = 0.3, budget: float = 0.3, rest: str = "") -> str:
    return STEP.format(alpha=alpha, partial=partial, budget=budget, rest=rest)


OLD = ",group=max,columns=sum,correction=False"
FRONTIER = (
    ("exact top k", tuple(f"oracle_topk(k={k})" for k in (0.05, 0.1, 0.2))),
    ("h2o", ("h2o(heavy=0.05,recent=0.05)", "h2o(heavy=0.1,recent=0.1)", "h2o(heavy=0.2,recent=0.2)")),
    ("streaming", ("streaming(sinks=4,window=0.2)",)),
    ("published", (PAPER, "infinigen_paper(alpha=8.0,partial=0.3,budget=0.2)", "infinigen_paper(alpha=inf,partial=0.3,budget=0.2)")),
    ("+ sinks, recent", tuple(_step(alpha, budget=0.2, rest=OLD) for alpha in (3.0, 4.0, 5.0))),
    ("+ joined by mass", tuple(_step(alpha, rest=",columns=sum,correction=False") for alpha in (7.0, 8.0))),
    ("+ correction", tuple(_step(alpha, rest=",columns=sum") for alpha in (7.0, 8.0))),
    ("+ product", tuple(_step(alpha) for alpha in (6.0, 6.5, 7.0, 7.5, 8.0, 8.5))),
    ("+ half of the columns: infinigen", tuple(_step(alpha, 0.5, 0.2) for alpha in (7.0, 7.5, 8.0, 8.5))),
    ("all columns", tuple(_step(alpha, partial=1.0) for alpha in (7.0, 8.0))),
)  # fmt: skip
"""Families of the frontier, each a line of the figure."""

THRESHOLDS, LOSSES = ("infinigen(budget=0.5)", "infinigen(budget=0.5,group=max)", "infinigen_paper(budget=0.5)"), (0.1, 0.05, 0.02)


# ------------------------------------------------------------------------------------------------------------------------------- layers


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is known of a layer: R rows, T queries at the end of S tokens.

    Attributes:
      truth: true logits, scaled; -inf for what comes after the query.
      queries: guessed queries [R, T, Hkv, G, D], as they meet the keys: made from the input below, corrected, or the layer's own of the
        token before.
      keys: of all tokens.
      projections: by rule, the columns of queries and of keys [Hkv, D, P].
    """

    truth: Float[np.ndarray, "R T Hkv G S"]
    queries: dict[str, Float[np.ndarray, "R T Hkv G D"]]
    keys: Float[np.ndarray, "R S Hkv D"]
    projections: dict[str, tuple[np.ndarray, np.ndarray]]


def layers(model: Model, calibration: Calibration, rows: Int[np.ndarray, "R S"], steps: int, partial: float) -> Iterator[tuple[int, Layer]]:
    """Every layer that is guessed for, from the third on."""
    config, (pairs, inputs) = model.config, captured(model, rows)
    at = np.arange(rows.shape[1] - steps, rows.shape[1])
    rotation = None if config.rope is None else rope_angles(config.rope, config.head_dim, jnp.asarray(at)[None])
    groups = (len(rows), steps, config.num_kv_heads, config.group_size, config.head_dim)
    for index in range(2, config.num_layers):
        q, keys = (np.asarray(x, np.float32) for x in pairs[index])
        below = np.asarray(inputs[index - 1], np.float32)[:, -steps:]
        weight = np.asarray(model.params["params"][f"layer_{index}"]["attention"]["q"]["weight"], np.float32)

        def turned(weight: np.ndarray) -> np.ndarray:
            plain = jnp.asarray(below @ weight.T).reshape(len(rows), steps, config.num_heads, config.head_dim)  # noqa: B023
            return np.asarray(plain if rotation is None else rotate(plain, rotation)).reshape(groups)

        truth = product(q[:, -steps:].reshape(groups), keys) * np.float32(config.head_dim**-0.5)
        truth[np.broadcast_to(np.arange(rows.shape[1]) > at[:, None, None, None], truth.shape)] = -np.inf
        queries = {"below": turned(weight), "corrected": turned(weight + calibration.up[index] @ calibration.down[index])}
        queries["last"] = q[:, -steps - 1 : -1].reshape(groups)
        kept = kept_columns(calibration, partial)[index][:, None]
        published = np.take_along_axis(calibration.skew[index], kept, axis=-1)
        few = published.shape[-1]
        projections = {
            "skew": (published, published),
            "product": (calibration.product_query[index][..., :few], calibration.product_key[index][..., :few]),
        }
        yield index, Layer(truth, queries, keys, projections)


def product(q: Float[np.ndarray, "R T Hkv G P"], k: Float[np.ndarray, "R S Hkv P"]) -> Float[np.ndarray, "R T Hkv G S"]:
    return np.einsum("rtngp,rsnp->rtngs", q, k, optimize=True)


def chosen(
    logits: Float[np.ndarray, "R T Hkv G S"], at: Int[np.ndarray, " T"], tokens: int, join: str, aside: tuple[int, int]
) -> Bool[np.ndarray, "R T Hkv S"]:
    """`tokens` tokens before each query, the first and the last of them always (`aside`), and the query's own."""
    slots = np.arange(logits.shape[-1])
    stored = (slots < at[:, None])[None, :, None]
    logits = np.where(stored[..., None, :], logits, -np.inf)
    if join == "max":
        wanted = logits.max(3)
    else:
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        wanted = (weights / weights.sum(-1, keepdims=True)).sum(3)
    fixed = (slots < aside[0]) | (slots >= at[:, None] - aside[1])
    wanted = np.where(stored, np.where(fixed[None, :, None], np.inf, wanted), -np.inf)
    best = np.argpartition(-wanted, tokens - 1, axis=-1)[..., :tokens]
    read = np.zeros(wanted.shape, bool)
    np.put_along_axis(read, best, True, -1)
    return (read & stored) | (slots == at[:, None])[None, :, None]


WAYS: dict[str, tuple[str, str, str, tuple[int, int]]] = {
    "published": ("below", "skew", "max", (0, 0)),
    "+ sinks, recent": ("below", "skew", "max", (4, 16)),
    "+ joined by mass": ("below", "skew", "mass", (4, 16)),
    "+ correction": ("corrected", "skew", "mass", (4, 16)),
    "+ product": ("corrected", "product", "mass", (4, 16)),
    "all columns": ("corrected", "all", "mass", (4, 16)),
    "all columns, 8 bits": ("corrected", "8 bits", "mass", (4, 16)),
    "all columns, own queries of the last step": ("last", "all", "mass", (4, 16)),
    "true queries": ("true", "all", "mass", (4, 16)),
    "exact top k": ("true", "all", "mass", (0, 0)),
}
"""Name -> queries, columns, how heads are joined, what is set aside. Up to "all columns" every line changes one thing."""


def rounded(keys: Float[np.ndarray, "R S Hkv D"], steps: int = 127) -> Float[np.ndarray, "R S Hkv D"]:
    """Keys in `steps` steps either way of the largest of their column, but for the first tokens, which are cut to it."""
    largest = np.abs(keys[:, 4:]).max((0, 1))
    return np.clip(np.round(keys / largest * steps), -steps, steps) * (largest / steps)


def missed(layer: Layer, at: Int[np.ndarray, " T"], tokens: int) -> dict[str, float]:
    """The share of the true attention that is not read, by WAYS; mean over queries and heads."""
    weights = np.exp(layer.truth - layer.truth.max(-1, keepdims=True))
    probability, dim = weights / weights.sum(-1, keepdims=True), layer.keys.shape[-1]
    found = {}
    for name, (queries, columns, join, aside) in WAYS.items():
        if queries == "true":
            logits = layer.truth
        elif columns in ("all", "8 bits"):
            logits = product(layer.queries[queries], layer.keys if columns == "all" else rounded(layer.keys))
        else:
            of_queries, of_keys = layer.projections[columns]
            projected = np.einsum("rtngd,ndp->rtngp", layer.queries[queries], of_queries, optimize=True)
            logits = product(projected, np.einsum("rsnd,ndp->rsnp", layer.keys, of_keys, optimize=True))
        scaled = logits * (1.0 if queries == "true" else dim**-0.5)
        read = chosen(scaled, at, tokens, join, aside)
        found[name] = float(1 - (probability * read[:, :, :, None]).sum(-1).mean())
    return found


# ----------------------------------------------------------------------------------------------------------------------------- frontier


def frontier(
    model: Model, calibration: Calibration, rows: Int[np.ndarray, "R S"], prompt_len: int, done: set[str]
) -> Iterator[dict[str, Any]]:
    """A record for every strategy of FRONTIER that is not `done`."""
    full = None
    for family, specs in FRONTIER:
        for spec in specs:
            if spec in done:
                continue
            if full is None:
                full = _fed(model, calibration, "full", rows, prompt_len)[0]
            logits, record = _fed(model, calibration, spec, rows, prompt_len)
            compared = fidelity.Comparison(*(np.asarray(x) for x in fidelity.compare(full, logits, rows[:, prompt_len:])))
            summary = compared.summary()
            kept = {name: summary[name].value for name in ("kld_mean", "same_top1", "nll_delta")} | {"kld_se": summary["kld_mean"].error}
            yield {"part": "frontier", "family": family, "strategy": spec, **kept, **record}


def thresholds(
    model: Model, calibration: Calibration, rows: Int[np.ndarray, "R S"], prompt_len: int, done: set[tuple[str, float]]
) -> Iterator[dict[str, Any]]:
    """A record for every strategy of THRESHOLDS and loss of LOSSES that is not `done`."""
    full = None
    for spec in THRESHOLDS:
        policy: Any = parse_strategy(spec).policy
        losses = [loss for loss in LOSSES if (spec, loss) not in done]
        if not losses:
            continue
        sample, text = (curves_of(with_curves(model, calibration, policy, tokens), policy) for tokens in (None, rows))
        if full is None:
            full = _fed(model, calibration, "full", rows, prompt_len)[0]
        for loss in losses:
            one, each = alpha_for(sample, loss), alpha_by_layer(sample, loss)
            record: dict[str, Any] = {"part": "thresholds", "strategy": spec, "loss": loss, "alpha": one, "alpha_by_layer": each.tolist()}
            for name, curves in (("sample", sample), ("text", text)):
                read, missed = (x.mean() for x in curves.at(each))
                same = curves.at(alpha_for(curves, missed))[0].mean()
                record[name] = {"held": curves.held, "missed_by_layer": missed, "read_by_layer": read, "read_by_one": same}
                record[name] |= {"missed_with_alpha": curves.at(one)[1].mean(), "read_with_alpha": curves.at(one)[0].mean()}
            chosen = dataclasses.replace(policy, alpha=one).describe()
            logits, decoded = _fed(model, calibration, chosen, rows, prompt_len)
            compared = fidelity.Comparison(*(np.asarray(x) for x in fidelity.compare(full, logits, rows[:, prompt_len:]))).summary()
            decoded = {name: decoded[name] for name in ("read", "moved", "mass_covered")}
            yield plain(record | decoded | {"kld_mean": compared["kld_mean"].value, "kld_se": compared["kld_mean"].error})


def _fed(model: Model, calibration: Calibration, spec: str, rows: Int[np.ndarray, "R S"], prompt_len: int):
    """Logits that predict every token behind the prompt; tokens read and moved per layer that does not read everything."""
    strategy = strategy_of(parse_strategy(spec).policy if spec != "full" else Full())
    ready = calibrated(model, strategy, calibration)
    lengths = np.full(len(rows), prompt_len, np.int32)
    first, kv = run_prefill(ready, strategy, rows[:, :prompt_len], lengths, rows.shape[1] - prompt_len)
    following, kv, found = fed_forced(ready, strategy, kv, rows[:, prompt_len:])
    record: dict[str, Any] = {"read": _read(strategy.policy, prompt_len)}
    if found:
        books, above = ledger(strategy, kv), strategy.policy.full_layers
        held = prompt_len + (rows.shape[1] - prompt_len - 1) / 2
        record = {name: float(np.mean([np.asarray(found[i][name]).mean() for i in found])) for name in MEASURES}
        record |= {"read": record.pop("fetched"), "moved": float(np.mean(books.fetched[above:])) * held}
        record["bytes_moved_per_token"] = books.bytes_moved_per_token or sum(books.fetched) * held * 2 * _row_bytes(model)
        record["read_by_layer"] = {str(i): float(np.asarray(found[i]["fetched"]).mean()) for i in found}
        record["mass_by_layer"] = {str(i): float(np.asarray(found[i]["mass_covered"]).mean()) for i in found}
    return jnp.concatenate([first[:, None], following[:, :-1]], axis=1), record


def _row_bytes(model: Model) -> int:
    """Bytes of the keys of one token in one layer."""
    return model.config.num_kv_heads * model.config.head_dim * np.dtype(model.dtype).itemsize


def _read(policy: Any, prompt_len: int) -> float:
    """Tokens that a policy keeps, or reads by their true logits, of a prompt."""
    kept = policy.kept_tokens(prompt_len)
    if kept is not None:
        return float(kept)
    return float(policy.k * prompt_len) if hasattr(policy, "k") else float(prompt_len)


# ------------------------------------------------------------------------------------------------------------------------------- output


def draw(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Divergence against tokens read, a line for every family."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="tokens read a step, of a kv head in a layer that guesses")
    axes.set_ylabel("divergence from the full cache (nats)")
    for number, (family, _) in enumerate(FRONTIER):
        points = sorted((r["read"], r["kld_mean"]) for r in records if r["part"] == "frontier" and r["family"] == family)
        if points:
            line = "-" if number < len(COLOURS) else "--"
            axes.plot(*zip(*points, strict=True), marker="o", label=family, color=COLOURS[number % len(COLOURS)], linestyle=line)
    axes.set_xticks([50, 100, 200, 400], ["50", "100", "200", "400"])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8, handlelength=3.5)
    figure.savefig(path)


def show(records: list[dict[str, Any]]) -> str:
    """Both tables as Markdown."""
    lines = []
    by_layer = [r for r in records if r["part"] == "layers"]
    if by_layer:
        lines += [f"Attention missed with {by_layer[0]['tokens']} tokens (%):", "", "| layer | " + " | ".join(WAYS) + " |"]
        lines += ["|--:|" + "--:|" * len(WAYS)]
        lines += [f"| {r['layer']} | " + " | ".join(f"{100 * r['missed'][way]:.1f}" for way in WAYS) + " |" for r in by_layer]
        means = (np.mean([r["missed"][way] for r in by_layer]) for way in WAYS)
        lines += ["| mean | " + " | ".join(f"{100 * x:.2f}" for x in means) + " |", ""]
    compared = [r for r in records if r["part"] == "thresholds"]
    if compared:
        lines += [
            "Tokens read of the text for the same attention missed, with one alpha for all layers and with an alpha for each:",
            "",
        ]
        lines += ["| strategy, loss | missed | one | each | saved | decoded with one alpha of | missed | read | KLD (nats) |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for r in compared:
        on = r["text"]
        saved = f"{100 * (1 - on['read_by_layer'] / on['read_by_one']):.1f} %"
        cells = [f"{on['missed_by_layer']:.4f}", f"{on['read_by_one']:.1f}", f"{on['read_by_layer']:.1f}", saved, f"{r['alpha']:.2f}"]
        cells += [f"{1 - r['mass_covered']:.4f}", f"{r['read']:.1f}", f"{r['kld_mean']:.4f}"]
        lines.append(f"| {r['strategy']}, {r['loss']} | {' | '.join(cells)} |")
    if not any(r["part"] == "frontier" for r in records):
        return "\n".join(lines)
    lines += ["| strategy | KLD (nats) | same top token | NLL | read | moved | mass |", "|---|--:|--:|--:|--:|--:|--:|"]
    for r in (r for r in records if r["part"] == "frontier"):
        moved, mass = (f"{r[key]:.{digits}f}" if key in r else "" for key, digits in (("moved", 0), ("mass_covered", 3)))
        quality = f"{r['kld_mean']:.4f} | {100 * r['same_top1']:.1f} % | {r['nll_delta']:+.3f}"
        lines.append(f"| {r['strategy']} | {quality} | {r['read']:.0f} | {moved} | {mass} |")
    return "\n".join(lines)


def text_rows(model: Model, count: int, length: int, path: str | None) -> Int[np.ndarray, "R S"]:
    """Rows of the text that start GAP tokens apart, or one after the other where it is short. Raises InputError."""
    if model.tokenizer is None:
        raise InputError(f"model {model.config.name} has no tokenizer to read text with")
    topics = pydoc_data.topics.topics
    text = pathlib.Path(path).read_text() if path else "\n\n".join(topics[name] for name in sorted(topics))
    ids = np.asarray(model.tokenizer.encode(text), np.int32)
    gap = min(GAP, (len(ids) - length) // max(count - 1, 1))
    if len(ids) < length or (count > 1 and gap < length):
        raise InputError(f"the text has {len(ids)} tokens, fewer than {count} rows of {length}")
    return np.stack([ids[i * gap : i * gap + length] for i in range(count)])


def define_flags() -> None:
    flags.DEFINE_string("model", "smollm2-135m", "A model with a tokenizer.")
    flags.DEFINE_string("output_dir", "experiments/results/infinigen_real", "Where records, figure and tables go.")
    flags.DEFINE_list("part", list(PARTS[:2]), f"Of {', '.join(PARTS)}.")
    flags.DEFINE_integer("rows", 4, "Rows of text.", lower_bound=1)
    flags.DEFINE_integer("skip_rows", 0, "Rows of the text that are left out before them.", lower_bound=0)
    flags.DEFINE_integer("input_len", 1024, "Tokens of a prompt.", lower_bound=64)
    flags.DEFINE_integer("output_len", 48, "Tokens behind it.", lower_bound=1)
    flags.DEFINE_integer("tokens", 204, "Tokens read, in the part `layers`.", lower_bound=32)
    flags.DEFINE_float("partial", 0.3, "Columns, as a share of a head, in the part `layers`.")
    flags.DEFINE_string("text", None, "A file to take the text from.")


def run(say: Callable[[str], None] = print) -> None:
    """Measures what is missing and writes everything."""
    if unknown := set(FLAGS.part) - set(PARTS):
        raise InputError(f"--part={','.join(sorted(unknown))} does not exist; choose from {', '.join(PARTS)}")
    directory = pathlib.Path(FLAGS.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    model = load_model(FLAGS.model)
    rows = text_rows(model, FLAGS.skip_rows + FLAGS.rows, FLAGS.input_len + FLAGS.output_len, FLAGS.text)[FLAGS.skip_rows :]
    about = {"model": model.config.name, "rows": len(rows), "input_len": FLAGS.input_len, "output_len": FLAGS.output_len}
    if other := [r for r in records if {name: r.get(name) for name in about} != about]:
        raise InputError(f"{path} holds results of { ({name: other[0].get(name) for name in about}) }; give another --output_dir")
    calibration = calibrate(model)

    def add(record: dict[str, Any]) -> None:
        records.append(about | record)
        with path.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        say(json.dumps({name: value for name, value in record.items() if "by_layer" not in name}))

    if "layers" in FLAGS.part and not any(r["part"] == "layers" for r in records):
        at = np.arange(FLAGS.input_len, rows.shape[1])
        for index, layer in layers(model, calibration, rows, FLAGS.output_len, FLAGS.partial):
            add({"part": "layers", "layer": index, "tokens": FLAGS.tokens, "missed": missed(layer, at, FLAGS.tokens)})
    if "frontier" in FLAGS.part:
        done = {r["strategy"] for r in records if r["part"] == "frontier"}
        for record in frontier(model, calibration, rows, FLAGS.input_len, done):
            add(record)
    if "thresholds" in FLAGS.part:
        compared = {(r["strategy"], r["loss"]) for r in records if r["part"] == "thresholds"}
        for record in thresholds(model, calibration, rows, FLAGS.input_len, compared):
            add(record)
    (directory / "tables.md").write_text(show(records) + "\n")
    if any(r["part"] == "frontier" for r in records):
        draw(records, directory / "frontier.svg")
    say(show(records))


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise InputError(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
        run()
    except KvjaxError as error:
        fail(error)


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=parse_flags)
