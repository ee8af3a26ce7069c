"""Compiled programs kept on disk, so that the next start of a program need not compile them again."""

import jax

from deperceiver_jax.files import as_path


def keep_compiled(directory: str) -> None:
    """Keeps what compiles for longer than a moment in `directory` (~ is the home directory); "" keeps nothing."""
    if directory:
        jax.config.update("jax_compilation_cache_dir", str(as_path(directory)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
