"""InfiniGen's calibration: attention stays as it is, magnitude gathers, and what is written comes back."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from kvjax.cache.steps import Forward
from kvjax.calibrate import (
    RANK,
    RIDGE,
    Calibration,
    _correction,
    calibrate,
    captured,
    columns_kept,
    concentration,
    kept_columns,
    load,
    prepare,
    queries_and_keys,
    sample_tokens,
    save,
)
from kvjax.errors import InputError, ModelError, SpecError
from kvjax.models import Model, load_model
from kvjax.models.decoder import Attention, guess_queries, rope_angles
from kvjax.models.guide import Guide
from kvjax.models.tokenizer import ByteTokenizer

PARITY = pathlib.Path(__file__).parent / "fixtures" / "parity"
ROTATED = ["llama_biased", "llama_untied", "qwen3"]  # multi-head with biases, grouped, grouped with norms of queries and keys
TOKENS = np.random.default_rng(1).integers(0, 128, (2, 24))


@dataclasses.dataclass(frozen=True)
class Case:
    """A small random model, what was measured on it, and its queries and keys on TOKENS (layers of [B, S, heads, D])."""

    model: Model
    calibration: Calibration
    queries_and_keys: list[tuple[np.ndarray, np.ndarray]]


_cases: dict[str, Case] = {}


def case(name: str) -> Case:
    if name not in _cases:
        model = load_model(PARITY / name, jnp.float32)
        found = [(np.asarray(q), np.asarray(k)) for q, k in queries_and_keys(model, TOKENS)]
        _cases[name] = Case(model, calibrate(model, TOKENS), found)
    return _cases[name]


def logits(model: Model) -> np.ndarray:
    step = Forward(jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape))
    return np.asarray(jax.jit(lambda params: model.decoder.apply(params, jnp.asarray(TOKENS), None, step)[0])(model.params))


def assert_close(got, want):
    """To 1e-4 of the largest value."""
    assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def attention_of(model: Model, layer: int) -> dict:
    return model.params["params"][f"layer_{layer}"]["attention"]


def guide_of(model: Model, layer: int) -> Guide:
    return model.params["guide"][f"layer_{layer}"]["attention"]["guide"]


# ------------------------------------------------------------------------------------------------------------------------- the skew


@pytest.mark.parametrize("name", ["opt", *ROTATED])
def test_skew_is_orthogonal_and_leaves_products_unchanged(name):
    skew = case(name).calibration.skew
    assert skew.dtype == np.float32
    assert_allclose(skew.swapaxes(-1, -2) @ skew, np.broadcast_to(np.eye(skew.shape[-1]), skew.shape), atol=1e-5)
    for turn, (q, k) in zip(skew, case(name).queries_and_keys, strict=True):
        group = q.shape[2] // k.shape[2]
        for head in range(q.shape[2]):
            query, key, a = q[:, :, head], k[:, :, head // group], turn[head // group]
            assert_close((query @ a) @ (key @ a).swapaxes(-1, -2), query @ key.swapaxes(-1, -2))


@pytest.mark.parametrize("name", ["opt", "qwen3"])
def test_skewed_queries_are_uncorrelated_and_masses_are_sums_of_magnitudes(name):
    calibration = case(name).calibration
    assert calibration.num_tokens == TOKENS.size
    for layer, (q, k) in enumerate(case(name).queries_and_keys):
        dim, group = q.shape[-1], q.shape[2] // k.shape[2]
        for head in range(k.shape[2]):
            queries, keys = q[:, :, head * group : (head + 1) * group].reshape(-1, dim), k[:, :, head].reshape(-1, dim)
            turn = calibration.skew[layer, head]
            gram = (queries @ turn).T @ (queries @ turn)
            assert_close(gram, np.diag(np.diag(gram)))
            assert (np.diff(np.diag(gram)) <= 1e-4 * gram.max()).all()
            for mass, rows in (
                (calibration.query_mass, queries @ turn),
                (calibration.key_mass, keys @ turn),
                (calibration.plain_query_mass, queries),
                (calibration.plain_key_mass, keys),
            ):
                assert_allclose(mass[layer, head], np.abs(rows).sum(0), rtol=1e-4)


def test_calibration_is_deterministic():
    again = calibrate(case("qwen3").model, jnp.asarray(TOKENS))
    for field in dataclasses.fields(Calibration):
        assert_array_equal(getattr(again, field.name), getattr(case("qwen3").calibration, field.name))


@pytest.fixture(scope="module")
def trained() -> Case:
    model = load_model("kvjax-1m", jnp.float32)
    return Case(model, calibrate(model), [])


def test_the_skew_concentrates_a_trained_model(trained):
    assert trained.calibration.num_tokens == 2048
    (query, key), (skewed_query, skewed_key) = (concentration(trained.calibration, skew=skew) for skew in (False, True))
    assert (skewed_query > query).all()
    assert (skewed_query + skewed_key).mean() > (query + key).mean()


# ---------------------------------------------------------------------------------------------------------------------- the columns


def made_up(query, key) -> Calibration:
    query, key = (np.array(mass, np.float32)[None, None] for mass in (query, key))
    turn, none = np.eye(query.shape[-1], dtype=np.float32)[None, None], np.zeros((1, 1, 1), np.float32)
    return Calibration("made up", "", 8, turn, query, key, key, query, turn, turn, none, none)


def test_columns_by_each_rule():
    calibration = made_up(query=[9, 1, 5, 2, 0, 3, 0, 0, 0, 0], key=[0, 8, 1, 5, 2, 0, 0, 0, 7, 0])
    assert kept_columns(calibration, 0.3, "sum").tolist() == [[[0, 1, 3]]]  # 9, 9 and 7; the tie with column 8 goes to the lower index
    assert kept_columns(calibration, 0.3, "query").tolist() == [[[0, 2, 5]]]
    assert kept_columns(calibration, 0.2, "union").tolist() == [[[0, 1, 2, 8]]]  # {0, 2} and {1, 8}
    assert kept_columns(calibration, 0.3, "union").tolist() == [[[0, 1, 2, 3, 5, 8]]]
    assert kept_columns(calibration, 0.3, "query", skew=False).tolist() == [[[1, 3, 8]]]  # the plain masses, here exchanged


def test_union_is_filled_up_where_the_sets_overlap():
    calibration = made_up(query=[9, 8, 1, 0, 0], key=[9, 0, 0, 7, 6])
    assert kept_columns(calibration, 0.4, "union").tolist() == [[[0, 1, 3, 4]]]  # {0, 1} and {0, 3}, then 4


@pytest.mark.parametrize(
    ("columns", "partial", "count"),
    [
        ("sum", 0.3, 19),
        ("query", 0.2, 12),
        ("union", 0.2, 24),
        ("union", 0.6, 64),
        ("sum", 1.0, 64),
        ("sum", 0.001, 1),
        ("union", 0.001, 2),
        ("product", 0.3, 19),
    ],
)
def test_number_of_columns(columns, partial, count):
    assert columns_kept(64, partial, columns) == count


@pytest.mark.parametrize("columns", ["product", "sum", "query", "union"])
@pytest.mark.parametrize("name", ["opt", "qwen3"])
def test_every_rule_makes_a_guide(name, columns):
    found = case(name)
    config = found.model.config
    prepared = prepare(found.model, found.calibration, partial=0.2, columns=columns)
    count = columns_kept(config.head_dim, 0.2, columns)
    for layer in range(config.num_layers):
        guide = guide_of(prepared, layer)
        assert guide.key.shape == (config.num_kv_heads, config.head_dim, count)
        assert (guide.following is None) == (layer == config.num_layers - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partial": 0.0}, "partial=0.0: give the fraction"),
        ({"partial": 1.5}, "partial=1.5: give the fraction"),
        ({"partial": float("nan")}, "partial=nan: give the fraction"),
        ({"columns": "key"}, "unknown choice of columns 'key'; choose from product, sum, query, union"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(SpecError, match=re.escape(message)):
        prepare(case("qwen3").model, case("qwen3").calibration, **options)


# ---------------------------------------------------------------------------------------------------------------- the prepared model


def partial_products(model: Model, layer: int, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The product of partial queries and keys of `layer`, made as its guide says from full ones: [B, H, S, S]."""
    following, key = guide_of(model, layer - 1).following, guide_of(model, layer).key
    assert following is not None
    groups = q.shape[2] // k.shape[2]
    project = key if following.project is None else following.project
    queries = np.einsum("bqhd,hdp->bhqp", q, np.repeat(project, groups, axis=0))
    return queries @ np.einsum("bkhd,hdp->bhpk", np.repeat(k, groups, axis=2), np.repeat(key, groups, axis=0))


@pytest.mark.parametrize("skew", [True, False])
@pytest.mark.parametrize("name", ROTATED)
def test_all_columns_give_the_whole_product(name, skew):
    prepared = prepare(case(name).model, case(name).calibration, partial=1.0, skew=skew)
    q, k = case(name).queries_and_keys[1]
    whole = np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, q.shape[2] // k.shape[2], axis=2))
    assert_close(partial_products(prepared, 1, q, k), whole)


@pytest.mark.parametrize("name", [*ROTATED, "opt"])
def test_projections_of_products_lose_least(name):
    """Over all pairs of a query and a key the mean square error is what no map of the rank can stay below, for every rank.

    With second moments A and B of queries and keys, the eigenvalues of A B are the squared singular values of the product of their roots;
    those that are left out are the least error (Eckart and Young).
    """
    found = case(name)
    heads = found.model.config.num_kv_heads
    for layer, (q, k) in enumerate(found.queries_and_keys):
        for head in range(heads):
            queries = q.reshape(-1, heads, q.shape[2] // heads, q.shape[3])[:, head].reshape(-1, q.shape[3]).astype(np.float64)
            keys = k[:, :, head].reshape(-1, k.shape[3]).astype(np.float64)
            products, moments = queries @ keys.T, (x.T @ x / len(x) for x in (queries, keys))
            values = np.sort(np.linalg.eigvals(np.linalg.multi_dot([*moments])).real)[::-1]
            for rank in (1, 3, q.shape[3] // 2, q.shape[3]):
                left, right = (x[layer, head, :, :rank] for x in (found.calibration.product_query, found.calibration.product_key))
                error = np.square((queries @ left) @ (keys @ right).T - products).mean()
                assert abs(error - values[rank:].sum()) < 1e-4 * values.sum()


def guessed(model: Model, layer: int, before: np.ndarray) -> np.ndarray:
    """Partial queries [Hkv, G, P] of `layer` for one token at position 0, where nothing is rotated, from the input of the layer before."""
    rotation = None if model.config.rope is None else rope_angles(model.config.rope, model.config.head_dim, jnp.zeros((1, 1), int))
    following = guide_of(model, layer - 1).following
    assert following is not None
    return np.asarray(guess_queries(model.config, following, jnp.asarray(before[None, None]), rotation)[0])


@pytest.mark.parametrize("columns", ["sum", "product"])
@pytest.mark.parametrize("name", ["llama_biased", "qwen3", "opt"])
def test_a_correction_is_added_to_the_query_weight(name, columns):
    model, calibration = case(name).model, case(name).calibration
    config, before = model.config, np.random.default_rng(2).standard_normal(model.config.hidden_size).astype(np.float32)
    changed = []
    for correction in (False, True):
        prepared = prepare(model, calibration, partial=0.4, columns=columns, correction=correction)
        own = attention_of(model, 1)
        weight = np.asarray(own["q"]["weight"], np.float64)
        if correction:
            weight = weight + calibration.up[1].astype(np.float64) @ calibration.down[1]
        q = (weight @ before + own["q"].get("bias", 0.0)).reshape(config.num_heads, config.head_dim)
        if config.qk_norm:
            q = q / np.sqrt((q**2).mean(-1, keepdims=True) + config.norm_eps) * own["q_norm"]
        turn = calibration.product_query[1] if columns == "product" else calibration.skew[1]
        kept = kept_columns(calibration, 0.4, columns)[1]
        want = np.einsum(
            "ngd,ndp->ngp", q.reshape(config.num_kv_heads, -1, config.head_dim), np.take_along_axis(turn, kept[:, None], axis=-1)
        )
        changed.append(guessed(prepared, 1, before))
        assert_close(changed[-1], want * config.head_dim**-0.5)
    assert np.abs(changed[1] - changed[0]).max() > 1e-3 * np.abs(changed[0]).max()


def test_a_correction_of_full_rank_is_the_ridge_regression():
    """Solved once more as least squares with the ridge as further rows."""
    rng = np.random.default_rng(0)
    before, own, weight = (rng.standard_normal(size) for size in ((200, 12), (200, 12), (10, 12)))
    own += before @ rng.standard_normal((12, 12))
    down, up = _correction(before, own, weight)
    ridge = np.sqrt(RIDGE * np.square(before).sum() / 12) * np.eye(12)
    missing = np.concatenate([(own - before) @ weight.T, np.zeros((12, 10))])
    want = np.linalg.lstsq(np.concatenate([before, ridge]), missing)[0]
    assert down.shape == (10, 12)
    assert_close((up @ down).T, want)


def test_a_correction_of_low_rank_is_the_best_of_its_rank():
    """The least that a rank can miss of the regression's predictions are their singular values behind it."""
    rng = np.random.default_rng(0)
    before, weight = rng.standard_normal((300, 40)) * np.linspace(0.2, 3, 40), rng.standard_normal((48, 40))
    own = before + before @ (rng.standard_normal((40, 40)) * np.linspace(1, 0.01, 40) ** 2)
    down, up = _correction(before, own, weight)
    moments = before.T @ before
    whole = np.linalg.solve(moments + RIDGE * np.trace(moments) / 40 * np.eye(40), before.T @ (own - before) @ weight.T)
    values = np.linalg.svd(before @ whole, compute_uv=False)
    assert down.shape == (RANK, 40)
    error = np.square(before @ (whole - (up @ down).T)).sum()
    assert np.square(values[RANK:]).sum() * (1 - 1e-6) < error < 1.01 * np.square(values[RANK:]).sum()


@pytest.mark.parametrize("name", [*ROTATED, "opt"])
def test_corrected_queries_are_closer_to_the_true_ones(name):
    """On the sample they were fitted to; layer 0 has none before it, and its correction does nothing."""
    found = case(name)
    assert np.abs(found.calibration.up[0] @ found.calibration.down[0]).max() < 1e-5
    _, inputs = captured(found.model, TOKENS)
    before, own = (np.asarray(x, np.float64).reshape(TOKENS.size, -1) for x in inputs[:2])
    weight = np.asarray(attention_of(found.model, 1)["q"]["weight"], np.float64)
    missed = (own - before) @ weight.T
    left = missed - before @ (found.calibration.up[1].astype(np.float64) @ found.calibration.down[1]).T
    assert np.square(left).sum() < 0.7 * np.square(missed).sum()


@pytest.mark.parametrize("name", ROTATED)
def test_rotary_models_share_their_parameters(name):
    model = case(name).model
    prepared = prepare(model, case(name).calibration)
    assert all(
        new is old for new, old in zip(jax.tree.leaves(prepared.params["params"]), jax.tree.leaves(model.params["params"]), strict=True)
    )
    following, layer = guide_of(prepared, 0).following, attention_of(model, 1)
    assert following.weight is layer["q"]["weight"]
    assert following.bias is layer["q"].get("bias")
    assert following.norm is layer.get("q_norm")
    assert (following.bias is not None, following.norm is not None) == (name == "llama_biased", name == "qwen3")
    assert_array_equal(following.project, guide_of(prepared, 1).key)


@pytest.mark.parametrize("name", ROTATED)
def test_rotary_models_keep_the_largest_columns_of_the_skew(name):
    calibration = case(name).calibration
    prepared = prepare(case(name).model, calibration, partial=0.3)
    for layer in range(len(calibration.skew)):
        for head, matrix in enumerate(guide_of(prepared, layer).key):
            best = np.sort(np.argsort(-(calibration.query_mass + calibration.key_mass)[layer, head])[: matrix.shape[-1]])
            assert_array_equal(matrix, calibration.skew[layer, head][:, best])


def test_preparing_again_replaces_the_guide():
    model, calibration = case("qwen3").model, case("qwen3").calibration
    twice = prepare(prepare(model, calibration, partial=0.5), calibration, partial=0.3)
    jax.tree.map(assert_array_equal, twice.params, prepare(model, calibration, partial=0.3).params)


def test_folding_leaves_logits_unchanged():
    model = case("opt").model
    prepared = prepare(model, case("opt").calibration)
    assert_close(logits(prepared), logits(model))
    for layer in range(model.config.num_layers):
        for projection in ("q", "k"):
            for part in ("weight", "bias"):
                new, old = (attention_of(m, layer)[projection][part] for m in (prepared, model))
                assert new.dtype == old.dtype
                assert np.abs(new - old).max() > 1e-3
        assert attention_of(prepared, layer)["v"] is attention_of(model, layer)["v"]


@pytest.mark.parametrize("skew", [True, False])
def test_folded_guide_is_a_choice_of_rows(skew):
    model, calibration = case("opt").model, case("opt").calibration
    prepared = prepare(model, calibration, partial=0.4, skew=skew)
    config, kept = model.config, kept_columns(calibration, 0.4, skew=skew)
    following, own = guide_of(prepared, 0).following, attention_of(prepared, 1)["q"]
    assert (following.norm, following.project) == (None, None)
    heads = (config.num_heads, config.head_dim)
    for head in range(config.num_heads):
        assert_array_equal(guide_of(prepared, 1).key[head], np.eye(config.head_dim)[:, kept[1, head]])
        at = slice(head * kept.shape[-1], (head + 1) * kept.shape[-1])
        assert_close(following.weight[at], own["weight"].reshape(*heads, -1)[head, kept[1, head]])
        assert_close(following.bias[at], own["bias"].reshape(heads)[head, kept[1, head]])
    if not skew:
        assert prepared.params["params"] is model.params["params"]


def test_folded_weights_give_the_skewed_queries_and_keys():
    found = case("opt")
    turned = queries_and_keys(prepare(found.model, found.calibration), TOKENS)
    for skew, new, old in zip(found.calibration.skew, turned, found.queries_and_keys, strict=True):
        for after, before in zip(new, old, strict=True):
            assert_close(after, np.einsum("bshd,hdc->bshc", before, skew))


def test_a_folded_model_is_not_skewed_twice():
    model, calibration = case("opt").model, case("opt").calibration
    prepared = prepare(model, calibration)
    for again in (lambda: prepare(prepared, calibration), lambda: calibrate(prepared, TOKENS)):
        with pytest.raises(SpecError, match="model opt is prepared already"):
            again()


@pytest.mark.parametrize("name", ["opt", "qwen3"])
def test_attention_finds_its_guide(name):
    prepared = prepare(case(name).model, case(name).calibration)
    seen = {}

    def look(call, args, kwargs, context):
        if isinstance(context.module, Attention):
            seen[context.module.layer] = context.module.get_variable("guide", "guide")
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        got = logits(prepared)
    for layer in range(prepared.config.num_layers):
        assert seen[layer].key.shape == guide_of(prepared, layer).key.shape
    assert seen[prepared.config.num_layers - 1].following is None
    assert_close(got, logits(case(name).model))


def test_dtype_follows_the_model():
    half = load_model(PARITY / "qwen3", jnp.bfloat16)
    prepared = prepare(half, case("qwen3").calibration)  # the calibration of the same weights in float32
    assert {leaf.dtype for leaf in jax.tree.leaves(prepared.params)} == {jnp.dtype(jnp.bfloat16)}
    folded = prepare(load_model(PARITY / "opt", jnp.bfloat16), case("opt").calibration)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded.params)} == {jnp.dtype(jnp.bfloat16)}


# ------------------------------------------------------------------------------------------------------------------------ the sample


def test_sample_fits_the_positions():
    model = case("qwen3").model
    assert sample_tokens(model).shape == (8, 256)
    assert sample_tokens(model, 100).shape == (1, 100)
    assert sample_tokens(model).max() < model.config.vocab_size


def test_sample_is_text_where_there_is_a_tokenizer():
    model = dataclasses.replace(case("qwen3").model, tokenizer=ByteTokenizer())
    assert bytes(sample_tokens(model, 200).astype(np.uint8)[0]).decode().isprintable() is False  # lines of source
    assert "self" in bytes(sample_tokens(model, 1024).astype(np.uint8).reshape(-1)).decode()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((1, 15), int), "15 calibration tokens; the 16 columns of a head need at least as many"),
        (np.zeros(32, int), "calibration tokens of shape (32,)"),
        (np.zeros((1, 32)), "and type float64; give whole numbers [B, S]"),
        (np.zeros((1, 300), int), "calibration rows of 300 tokens; model qwen3 has 256 positions"),
        (np.full((1, 32), 128), "calibration token ids from 128 to 128; model qwen3 has ids 0 to 127"),
        (np.full((1, 32), -1), "calibration token ids from -1 to -1"),
    ],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(InputError, match=re.escape(message)):
        calibrate(case("qwen3").model, tokens)


def test_overflowing_model():
    model = case("qwen3").model
    attention = attention_of(model, 1) | {"q_norm": jnp.full(model.config.head_dim, jnp.inf)}
    layer = model.params["params"]["layer_1"] | {"attention": attention}
    broken = dataclasses.replace(model, params={"params": model.params["params"] | {"layer_1": layer}})
    with pytest.raises(ModelError, match="queries or keys of layer 1 are not finite in float32"):
        calibrate(broken, TOKENS)


# ------------------------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture
def written(tmp_path) -> pathlib.Path:
    save(case("qwen3").calibration, tmp_path / "calibration")
    return tmp_path / "calibration"


def test_round_trip(written):
    restored = load(written, case("qwen3").model)
    for field in dataclasses.fields(Calibration):
        got, want = (getattr(c, field.name) for c in (restored, case("qwen3").calibration))
        assert type(got) is type(want)
        assert_array_equal(got, want, strict=isinstance(want, np.ndarray))


def test_calibration_of_another_model(written):
    with pytest.raises(
        SpecError, match=re.escape("model opt [2, 4, 8] (layers, kv heads, head dim): the calibration belongs to qwen3 [2, 2, 16]")
    ):
        load(written, case("opt").model)
    other = load_model(PARITY / "qwen3", jnp.float32, random_weights=True)
    with pytest.raises(SpecError, match="the calibration belongs to other weights"):
        load(written, other)
    with pytest.raises(SpecError, match="the calibration belongs to other weights"):
        prepare(other, case("qwen3").calibration)


def test_existing_directory_is_not_overwritten(written):
    with pytest.raises(ModelError, match="exists already"):
        save(case("qwen3").calibration, written)


def break_description(path: pathlib.Path) -> None:
    next(file for file in (path / "calibration").iterdir() if file.name == "metadata").write_text("{")


def change_shape(path: pathlib.Path) -> None:
    file = next(file for file in (path / "calibration").iterdir() if file.name == "metadata")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [2, 2, 8]}))


def drop_index(path: pathlib.Path) -> None:
    (path / "arrays" / "manifest.ocdbt").unlink()


@pytest.mark.parametrize("damage", [break_description, change_shape, drop_index])
def test_damaged_calibration(written, damage):
    damage(written)
    with pytest.raises(ModelError, match="calibration: the calibration cannot be restored: ") as error:
        load(written)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("")])
def test_not_a_calibration(tmp_path, make):
    make(tmp_path / "other")
    with pytest.raises(ModelError, match="other is not a calibration; "):
        load(tmp_path / "other")


# ----------------------------------------------------------------------------------------------------------------- the command line


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "kvjax.calibrate", *arguments], capture_output=True, text=True, timeout=300)


def test_command_line(tmp_path):
    process = command("--model=kvjax-1m", "--random_weights", "--num_tokens=64", f"--output_dir={tmp_path / 'new' / 'calibration'}")
    assert (process.returncode, process.stderr) == (0, "")
    assert "kvjax-1m (float32), 64 tokens: magnitude in 9 of 32 columns" in process.stdout
    assert len(re.findall(r"^\d( +\d+\.\d%){4}$", process.stdout, re.MULTILINE)) == 5
    calibration = load(tmp_path / "new" / "calibration", load_model("kvjax-1m", jnp.float32, random_weights=True))
    assert calibration.num_tokens == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir={}"], "kvjax: {} exists already; a calibration is written to a new directory"),
        (["--num_tokens=0"], "kvjax: flag --num_tokens=0: 0 is not a positive integer"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    process = command(*(argument.format(tmp_path) for argument in arguments))
    assert process.returncode == 2
    assert process.stderr.startswith(message.format(tmp_path))
    assert len(process.stderr.splitlines()) == 1
