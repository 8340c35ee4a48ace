"""How many small mistakes the tests of the core would notice: a fixed sample of mutants, by cosmic-ray.

`python tests/mutation_sample.py 8` copies the last commit to a temporary folder, lists all mutants of every module
below, draws eight of each with a fixed seed and runs the module's own doctests and tests on each, in one process per
module so that nothing is compiled twice. Mutants of annotations are left out, for they change nothing that runs. Needs
`pip install cosmic-ray`.
"""

import ast
import contextlib
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

SEED = 0
MODULES = {
    "masking.py": ["test_masking.py"],
    "logprobs.py": ["test_logprobs.py"],
    "vocabulary_chunks.py": ["test_vocabulary_chunks.py"],
    "teacher_chunks.py": ["test_vocabulary_chunks.py"],
    "kl.py": ["test_kl.py"],
    "advantages.py": ["test_advantages.py"],
    "returns.py": ["test_advantages.py"],
    "group_advantages.py": ["test_group_advantages.py"],
    "token_advantages.py": ["test_group_advantages.py"],
    "pass_at_k.py": ["test_group_advantages.py"],
    "losses/anchored_preference.py": ["losses/test_preference.py"],
    "losses/categorical_value.py": ["losses/test_value.py", "losses/test_actor_critic_gradients.py"],
    "losses/covariance_policy.py": ["losses/test_covariance_policy.py"],
    "losses/distillation.py": ["losses/test_distillation.py"],
    "losses/distributional_preference.py": ["losses/test_distributional_preference.py"],
    "losses/divergence_preference.py": ["losses/test_divergence_preference.py", "losses/test_preference.py"],
    "losses/feedback.py": ["losses/test_feedback.py"],
    "losses/gated_policy.py": ["losses/test_policy.py", "losses/test_actor_critic_gradients.py"],
    "losses/head_divergences.py": ["losses/test_head_divergences.py"],
    "losses/human_distillation.py": ["losses/test_human_distillation.py"],
    "losses/importance.py": ["losses/test_importance.py"],
    "losses/offline_q_learning.py": ["losses/test_q_learning.py", "losses/test_published_defaults.py"],
    "losses/online_preference.py": ["losses/test_online_preference.py"],
    "losses/policy.py": ["losses/test_policy.py", "losses/test_published_defaults.py"],
    "losses/preference.py": ["losses/test_preference.py"],
    "losses/preference_inputs.py": ["losses/test_preference_inputs.py"],
    "losses/q_learning.py": ["losses/test_q_learning.py"],
    "losses/ranking.py": ["losses/test_ranking.py"],
    "losses/rating.py": ["losses/test_rating.py"],
    "losses/reference_free_preference.py": ["losses/test_preference.py"],
    "losses/regression_policy.py": ["losses/test_regression_policy.py", "losses/test_published_defaults.py"],
    "losses/reward_model.py": ["losses/test_reward_model.py"],
    "losses/sampled_distillation.py": ["losses/test_distillation.py", "losses/test_human_distillation.py"],
    "losses/sequence_policy.py": ["losses/test_sequence_policy.py"],
    "losses/supervised.py": ["losses/test_supervised.py"],
    "losses/tamer.py": ["losses/test_tamer.py"],
    "losses/unpaired_preference.py": ["losses/test_unpaired_preference.py"],
    "losses/value.py": ["losses/test_value.py"],
}


def lines_that_run(source: str) -> set[int]:
    """Lines inside functions, without their signatures and docstrings."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            for statement in node.body[1:] if ast.get_docstring(node) else node.body:
                lines.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return lines


def sample(module: pathlib.Path, count: int) -> list:
    """Some of a module's mutants, always the same."""
    from cosmic_ray.commands.init import init
    from cosmic_ray.work_db import WorkDB, use_db

    code = lines_that_run(module.read_text())
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/session.sqlite", WorkDB.Mode.create) as database:
        init([module], database, {})
        mutants = [item.mutations[0] for item in database.work_items]
    mutants = sorted((m for m in mutants if m.start_pos[0] in code), key=repr)
    return random.Random(SEED).sample(mutants, min(count, len(mutants)))


def passes(paths: list[str], seconds: float = 0) -> bool:
    """Whether the tests pass in this process, with the package imported anew, within a time if one is given."""
    import pytest

    for name in list(sys.modules):
        if name.split(".")[0] in ("rlhf_jax", "conftest") or name.startswith("test_"):
            del sys.modules[name]

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return pytest.main(["-q", "-x", "-p", "no:cacheprovider", *paths]) == 0
    except TimeoutError:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def examine(name: str, count: int) -> None:
    """Tries a module's mutants where the process stands and prints the result as JSON."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import use_mutation

    sys.dont_write_bytecode = True
    sys.path.insert(0, os.getcwd())
    module = pathlib.Path("rlhf_jax") / name
    paths = [str(module), *(f"tests/{test}" for test in MODULES[name])]
    start = time.monotonic()
    if not passes(paths):
        raise SystemExit(f"the tests of {name} fail without any mutant")
    patience = 60 + 5 * (time.monotonic() - start)
    tried, survivors = 0, []
    for mutant in sample(module, count):
        operator = cosmic_ray.plugins.get_operator(mutant.operator_name)(**mutant.operator_args)
        with use_mutation(module, operator, mutant.occurrence) as (before, after):
            if after is not None:
                tried += 1
                if passes(paths, patience):
                    row = mutant.start_pos[0] - 1
                    survivors.append([row + 1, before.splitlines()[row].strip(), after.splitlines()[row].strip()])
    print(json.dumps([tried, survivors]))


def main(count: int, modules: list[str]) -> None:
    """Prints a line per module, the surviving mutants, and the score."""
    root = pathlib.Path(__file__).parents[1]
    total = alive = 0
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=root, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
        for module in modules or MODULES:
            command = [sys.executable, __file__, "--examine", module, str(count)]
            output = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
            tried, survivors = json.loads(output.splitlines()[-1])
            total, alive = total + tried, alive + len(survivors)
            print(f"{module}: {tried - len(survivors)} of {tried} noticed", flush=True)
            for line, before, after in survivors:
                print(f"  {module}:{line}\n    - {before}\n    + {after}", flush=True)
    print(f"score: {100 * (total - alive) / total:.0f} % of {total} mutants")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--examine"]:
        examine(sys.argv[2], int(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 8, sys.argv[2:])
