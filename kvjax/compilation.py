"""Compiled programs kept on disk, so that a command that is run again need not compile again (JAX's persistent compilation cache)."""

import os

import jax
from absl import flags

from kvjax.models.public import home

MAX_BYTES = 4 << 30
"""What is kept at most; the programs used least recently give way."""
MIN_SECONDS = 0.1
"""Programs that compile faster are not kept: there are many, and to read one takes as long."""


def define_flag() -> None:
    """Called once by a program, before its flags are parsed."""
    flags.DEFINE_bool(
        "compilation_cache", True, f"Keep compiled programs in {home() / 'compiled'} (KVJAX_HOME says where else), up to "
        f"{MAX_BYTES >> 30} GiB; --nocompilation_cache compiles everything anew.",
    )  # fmt: skip


def apply_flag() -> None:
    """Does what the flag says. JAX's own settings (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) come first."""
    if not flags.FLAGS["compilation_cache"].value:
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.jax_compilation_cache_dir is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        keep_compiled()


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder from now on; without a word, nothing is kept where nothing can be written."""
    folder = home() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
