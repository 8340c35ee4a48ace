"""A strict runtime for every test: four CPU devices, no silent broadcasting of ranks, quick compilation and a cache."""

import importlib.metadata
import os
import pathlib
import signal
import tempfile

# Tests compile thousands of small programs and run each for a moment: half of their time would go into optimising code.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    + "--xla_cpu_use_fusion_emitters=false "  # known up to jaxlib 0.10; 0.12 aborts at it
    * (tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11))
    + os.environ.get("XLA_FLAGS", "")
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(tempfile.gettempdir()) / f"rlhf_jax-test-cache-{os.getuid()}")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with Ctrl-C ignored

hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("default")


@pytest.fixture
def key():
    return jax.random.key(0)
