"""Prefill attention with log-sum-exp, and column mass: every implementation against every score at once in NumPy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels.dispatch import UnsupportedError, interpreted
from kvjax.kernels.prefill_attention import api, column_mass, mosaic_gpu, mosaic_tpu, prefill_attention, reference, xla
from kvjax.kernels.prefill_attention.mosaic_gpu import Config

from kvjax.cache.attention import prompt_attention
from kvjax.cache.policies import Policy

OUT_TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}  # of outputs up to about 3, rounded to this dtype
LSE_TOLERANCE = 2e-5  # whatever the dtype: products of bfloat16 and float16 are exact in float32
MASS_TOLERANCE = 2e-5  # of a key's mass, relative; and absolute, for keys that receive nothing


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of `counts` queries that begin at `starts`, in arrays with room for `queries` and `keys`."""

    counts: tuple[int, ...]
    starts: tuple[int, ...] = (0,)
    queries: int = 0
    keys: int = 0
    kv_heads: int = 2
    group: int = 2
    dim: int = 64
    dtype: str = "bfloat16"
    scale: float | None = None

    def __str__(self):
        counts, starts = ("_".join(map(str, numbers)) for numbers in (self.counts, self.starts))
        return f"{counts}-from{starts}-{self.kv_heads}h-g{self.group}-d{self.dim}-{self.dtype}"


SMALL = Config(warpgroups=2, queries=64, stages=2)
BLOCK = SMALL.keys
"""Keys of a block of SMALL, and queries and keys of attention's: one less, it, one more are the lengths to try."""

CASES = [
    Case(counts=(0, 1, 63, 64, 65), kv_heads=1, group=1),
    Case(counts=(BLOCK - 1, BLOCK, BLOCK + 1), kv_heads=1, group=1, dim=128),
    Case(counts=(140,), kv_heads=1, group=3, scale=0.05),
    Case(counts=(70, 3), starts=(100, 129), queries=80, keys=200, kv_heads=1),  # chunks
    Case(counts=(70,), kv_heads=2, group=1, dim=80, dtype="float16"),
]
EXACT = [
    Case(counts=(130, 1, 0), kv_heads=1, group=3, dim=48, dtype="float32"),
    Case(counts=(60, 170), starts=(200, 7), queries=170, keys=270, kv_heads=1, dtype="float32"),
]


@dataclasses.dataclass
class Problem:
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    start: np.ndarray
    count: np.ndarray
    scale: float | None

    @property
    def counts(self):
        return np.arange(self.q.shape[1]) < self.count[:, None]


def problem(case: Case, rng: np.random.Generator) -> Problem:
    """NaN wherever nothing counts."""
    batch, dtype = len(case.counts), jnp.dtype(case.dtype)
    count, start = np.array(case.counts, np.int32), np.broadcast_to(np.array(case.starts, np.int32), (batch,))
    size, length = case.queries or max(case.counts), case.keys or int((start + count).max())
    heads = (case.kv_heads * case.group, case.kv_heads, case.kv_heads)
    sizes = (size, length, length)
    q, k, v = (rng.normal(size=(batch, n, h, case.dim)).astype(dtype) for n, h in zip(sizes, heads, strict=True))
    q *= dtype.type(2)  # so that attention has favourites
    for b in range(batch):
        q[b, count[b] :] = np.nan
        k[b, start[b] + count[b] :] = np.nan
        v[b, start[b] + count[b] :] = np.nan
    return Problem(q, k, v, start, count, case.scale)


def call(function, implementation, *arguments, **options):
    """Jitted; Mosaic kernels interpreted, with two warpgroups to a block, races being errors."""
    run = jax.jit(partial(function, implementation=implementation, **options))
    if implementation == "xla":
        return jax.device_get(run(*arguments))
    with interpreted(implementation, threads=SMALL.warpgroups if implementation == "mosaic_gpu" else 1):
        return jax.device_get(run(*arguments))


def verify_attention(case: Case, rng: np.random.Generator, implementation: str, function=prefill_attention):
    given = problem(case, rng)
    out, lse = call(function, implementation, given.q, given.k, given.v, given.start, given.count, scale=given.scale)
    want, sums = reference.prefill_attention(given.q, given.k, given.v, given.start, given.count, given.scale)
    assert out.dtype == given.q.dtype
    assert lse.dtype == np.float32
    np.testing.assert_allclose(out.astype(np.float32), want, atol=OUT_TOLERANCE[case.dtype], rtol=0)
    np.testing.assert_array_equal(out[~given.counts], 0)
    np.testing.assert_allclose(lse, sums, atol=LSE_TOLERANCE, rtol=1e-6)


def verify_mass(case: Case, rng: np.random.Generator, implementation: str, function=column_mass):
    given = problem(case, rng)
    _, lse = reference.prefill_attention(given.q, given.k, given.v, given.start, given.count, given.scale)
    lse = np.where(given.counts[:, None], lse, np.nan).astype(np.float32)
    mass = call(function, implementation, given.q, given.k, lse, given.start, given.count, scale=given.scale)
    want = reference.column_mass(given.q, given.k, lse, given.start, given.count, given.scale)
    assert mass.dtype == np.float32
    np.testing.assert_allclose(mass, want, atol=MASS_TOLERANCE, rtol=MASS_TOLERANCE)
    np.testing.assert_allclose(mass.sum((1, 2)), given.count * given.q.shape[2], rtol=1e-4)  # probabilities of a query add up to one


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles for problems of the interpreter's size, so that they have several of them; those for a card are tried once below."""
    monkeypatch.setattr(mosaic_gpu, "config_for", lambda *sizes: SMALL)
    monkeypatch.setattr(mosaic_gpu, "MASKED", 32)
    monkeypatch.setattr(mosaic_tpu, "BLOCK_Q", 128)
    monkeypatch.setattr(mosaic_tpu, "BLOCK_K", 128)
    monkeypatch.setattr(xla, "BLOCK_Q", 64)
    monkeypatch.setattr(xla, "BLOCK_K", 96)


@pytest.mark.usefixtures("small_tiles")
class TestPrefillAttention:
    @pytest.mark.parametrize("case", CASES + EXACT, ids=str)
    def test_xla(self, case, rng):
        verify_attention(case, rng, "xla")

    @pytest.mark.parametrize("case", [*CASES[:-1], dataclasses.replace(CASES[-1], dim=64)], ids=str)
    def test_mosaic_gpu(self, case, rng):
        verify_attention(case, rng, "mosaic_gpu")

    @pytest.mark.parametrize(
        ("case", "reason"),
        [
            (Case(counts=(8,), dtype="float32"), "tensor cores take bfloat16 or float16, these are float32 and float32"),
            (Case(counts=(8,), dim=72), "head dim 72 is neither 64 nor 128"),
            (Case(counts=(8,), dim=256), "head dim 256 is neither 64 nor 128"),
        ],
    )
    def test_kernel_says_what_it_cannot_do(self, case, reason, rng):
        with pytest.raises(UnsupportedError, match=reason):
            verify_attention(case, rng, "mosaic_gpu")

    def test_wrong_shapes_are_refused(self):
        q, k, start = jnp.zeros((2, 8, 4, 16)), jnp.zeros((2, 8, 2, 16)), jnp.zeros(2, jnp.int32)
        for arguments, message in [
            ((q, k[:1], k[:1], start, start), "do not fit together"),
            ((q[:, :, :3], k, k, start, start), "3 query heads are no multiple of 2 kv heads"),
            ((q, k, k, start[:1], start), "not one number for each of 2 rows"),
            ((q, k, k[:, 1:], start, start), "differ in shape"),
        ]:
            with pytest.raises(ValueError, match=message):
                prefill_attention(*arguments)
        with pytest.raises(ValueError, match="lse"):
            column_mass(q, k, jnp.zeros((2, 8, 4)), start, start)


@pytest.mark.usefixtures("small_tiles")
class TestColumnMass:
    @pytest.mark.parametrize("case", CASES + EXACT, ids=str)
    def test_xla(self, case, rng):
        verify_mass(case, rng, "xla")

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_mosaic_gpu(self, case, rng):
        verify_mass(case, rng, "mosaic_gpu")

    @pytest.mark.parametrize("case", [*CASES[:-1], *EXACT], ids=str)
    def test_mosaic_tpu(self, case, rng):
        verify_mass(case, rng, "mosaic_tpu")

    @pytest.mark.parametrize("config", mosaic_gpu.CONFIGS[::2], ids=str)
    def test_tiles_for_a_card(self, config, rng, monkeypatch):
        monkeypatch.setattr(mosaic_gpu, "config_for", lambda *sizes: config)
        monkeypatch.setattr(mosaic_gpu, "MASKED", 16)
        verify_mass(Case(counts=(260,), kv_heads=1, group=1, dim=128), rng, "mosaic_gpu")

    def test_is_the_score_of_a_prompt(self, rng):
        """What H2O's policy adds up over the blocks of the library's own prompt attention."""
        given = problem(Case(counts=(150, 40), dtype="float32"), rng)
        library = jax.jit(partial(prompt_attention, group_mass=partial(Policy.group_mass, None), block=64))
        q, k, v = (np.nan_to_num(x) for x in (given.q, given.k, given.v))
        _, want = library(q, k, v, given.counts)
        _, lse = call(prefill_attention, "xla", given.q, given.k, given.v, given.start, given.count)
        mass = call(column_mass, "xla", given.q, given.k, lse, given.start, given.count)
        np.testing.assert_allclose(mass, want, atol=MASS_TOLERANCE, rtol=MASS_TOLERANCE)

    def test_chunks_add_up(self, rng):
        given = problem(Case(counts=(200,), kv_heads=1, dtype="float32"), rng)
        whole = reference.column_mass(given.q, given.k, *_sums(given), given.start, given.count)
        total = np.zeros_like(whole)
        attend, add = (jax.jit(partial(function, implementation="xla")) for function in (prefill_attention, column_mass))
        for first, last in ((0, 90), (90, 91), (91, 200)):
            q = np.pad(given.q[:, first:last], ((0, 0), (0, 110 - (last - first)), (0, 0), (0, 0)), constant_values=np.nan)
            where = np.array([first]), np.array([last - first])
            total += add(q, given.k, attend(q, given.k, given.v, *where)[1], *where)
        np.testing.assert_allclose(total, whole, atol=MASS_TOLERANCE, rtol=MASS_TOLERANCE)

    @pytest.mark.parametrize("function", ["prefill_attention", "column_mass"])
    def test_nothing_as_large_as_the_scores(self, function):
        """Twice the prompt, twice the scratch memory, not four times; and far less than the scores."""
        temporary = []
        for size in (2048, 4096):
            q, k = (jax.ShapeDtypeStruct((1, size, heads, 32), jnp.float32) for heads in (4, 2))
            lse, row = jax.ShapeDtypeStruct((1, 4, size), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
            arguments = (q, k, k, row, row) if function == "prefill_attention" else (q, k, lse, row, row)
            compiled = jax.jit(partial(getattr(api, function), implementation="xla")).lower(*arguments).compile()
            temporary.append(compiled.memory_analysis().temp_size_in_bytes)
        assert temporary[1] < 2.1 * temporary[0]
        assert temporary[1] < 4 * 4096**2 * 4 / 8


def _sums(given: Problem):
    return (reference.prefill_attention(given.q, given.k, given.v, given.start, given.count)[1],)


@pytest.mark.parametrize(
    ("batch", "kv_heads", "length", "dim", "want"),
    [
        (1, 8, 8192, 128, Config(4, 128, 3)),  # 256 blocks of 256 keys
        (1, 40, 2048, 128, Config(4, 128, 3)),
        (4, 8, 2048, 128, Config(4, 128, 3)),
        (2, 8, 2048, 128, Config(2, 128, 3)),  # 128 blocks of 256 keys would leave 4 of 132 multiprocessors idle
        (1, 8, 2048, 128, Config(1, 128, 2)),
        (1, 8, 512, 128, Config(1, 128, 2)),  # there are no 132 blocks
        (1, 8, 8192, 256, Config(2, 128, 2)),  # the ones before it do not fit
    ],
)
def test_tiles_are_as_large_as_the_card_stays_busy(batch, kv_heads, length, dim, want):
    assert mosaic_gpu.config_for(batch, kv_heads, length, dim, cores=132) == want
    assert want.shared_memory(dim) <= mosaic_gpu.SHARED_MEMORY


class TestTheTestsCanFail:
    """Each of these is a mistake somebody could make; the cases above must notice."""

    @staticmethod
    def uses_an_lse_in_bfloat16(operation, q, k, lse, start, count, **how):
        return operation(q, k, lse.astype(jnp.bfloat16).astype(jnp.float32), start, count, **how)

    @staticmethod
    def sees_the_next_token(operation, q, k, x, start, count, **how):
        return operation(q, k, x, start + 1, count, **how)

    @staticmethod
    def forgets_the_last_query(operation, q, k, x, start, count, **how):
        return operation(q, k, x, start, count - 1, **how)

    @staticmethod
    def takes_one_head_of_the_group(operation, q, k, lse, start, count, **how):
        return operation(q[:, :, ::2], k, lse[:, ::2], start, count, **how)

    @staticmethod
    def forgets_the_scale(operation, q, k, x, start, count, scale, **how):
        return operation(q, k, x, start, count, **how)

    BOTH = (sees_the_next_token, forgets_the_last_query, forgets_the_scale)
    OF_MASS = (*BOTH, uses_an_lse_in_bfloat16, takes_one_head_of_the_group)

    @pytest.mark.parametrize("mutant", OF_MASS, ids=lambda mutant: mutant.__name__)
    def test_mistake_in_mass_is_noticed(self, mutant, rng):
        with pytest.raises(AssertionError):
            verify_mass(Case(counts=(100, 80), scale=0.2), rng, "xla", partial(mutant, column_mass))

    @pytest.mark.parametrize("mutant", BOTH, ids=lambda mutant: mutant.__name__)
    def test_mistake_in_attention_is_noticed(self, mutant, rng):
        with pytest.raises(AssertionError):
            verify_attention(Case(counts=(100, 80), scale=0.2), rng, "xla", partial(mutant, prefill_attention))

    @pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
    def test_a_diagonal_one_off_is_noticed(self, implementation, rng, monkeypatch, small_tiles):
        """In the kernels themselves: their masks think that a row begins one token later than it does."""
        module = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}[implementation]
        original = module._column_mass

        def shifted(*refs, **how):
            class Later:
                def __init__(self, ref):
                    self.ref = ref

                def __getitem__(self, at):
                    return self.ref[at] + (1 if implementation == "mosaic_tpu" or at[1] == 0 else 0)

            place = 3 if implementation == "mosaic_gpu" else 0
            return original(*refs[:place], Later(refs[place]), *refs[place + 1 :], **how)

        monkeypatch.setattr(module, "_column_mass", shifted)
        with pytest.raises(AssertionError):
            verify_mass(Case(counts=(200,), kv_heads=1), rng, implementation)
