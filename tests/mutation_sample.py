"""How many small mistakes the tests of the core would notice: a fixed sample of mutants, by cosmic-ray.

`python tests/mutation_sample.py 8` copies the last commit to a temporary folder, lists all mutants of every module
below, draws eight of each with a fixed seed and runs the module's own doctests and tests on each. Mutants of type
annotations are left out, for they change nothing that runs. Needs `pip install cosmic-ray`.
"""

import ast
import pathlib
import random
import subprocess
import sys
import tempfile

SEED = 0
MODULES = {
    "masking.py": "test_masking.py",
    "logprobs.py": "test_logprobs.py",
    "kl.py": "test_kl.py",
    "advantages.py": "test_advantages.py",
    "returns.py": "test_advantages.py",
    "group_advantages.py": "test_group_advantages.py",
    "losses/policy.py": "losses/test_policy.py",
    "losses/sequence_policy.py": "losses/test_sequence_policy.py",
    "losses/preference.py": "losses/test_preference.py",
    "losses/unpaired_preference.py": "losses/test_unpaired_preference.py",
    "losses/reward_model.py": "losses/test_reward_model.py",
    "losses/value.py": "losses/test_value.py",
    "losses/distillation.py": "losses/test_distillation.py",
    "losses/feedback.py": "losses/test_feedback.py",
}
CONFIG = """[cosmic-ray]
module-path = "rlhf_jax/{module}"
timeout = 300.0
excluded-modules = []
test-command = "{python} -m pytest -q -x -p no:cacheprovider rlhf_jax/{module} tests/{tests}"
[cosmic-ray.distributor]
name = "local"
"""


def runs(source: str) -> set[int]:
    """Lines that hold code that runs: neither annotations of signatures nor docstrings nor `__all__`."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            for statement in node.body[1:] if ast.get_docstring(node) else node.body:
                lines.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return lines


def survivors(folder: pathlib.Path, module: str, count: int) -> tuple[int, list[str]]:
    """How many mutants of a module were tried, and the differences of those that no test noticed."""
    from cosmic_ray.work_db import WorkDB, use_db

    config, session = folder / "mutation.toml", folder / f"{module.replace('/', '-')}.sqlite"
    config.write_text(CONFIG.format(module=module, python=sys.executable, tests=MODULES[module]))
    command = [sys.executable, "-m", "cosmic_ray.cli"]
    subprocess.run([*command, "init", config.name, session.name], cwd=folder, check=True)
    code = runs((folder / "rlhf_jax" / module).read_text())
    with use_db(session, WorkDB.Mode.open) as database:
        items = sorted(database.work_items, key=lambda item: repr(item.mutations))
        items = [item for item in items if item.mutations[0].start_pos[0] in code]
        chosen = random.Random(SEED).sample(items, min(count, len(items)))
        database.clear()
        database.add_work_items(chosen)
    subprocess.run([*command, "exec", config.name, session.name], cwd=folder, check=True)
    with use_db(session, WorkDB.Mode.open) as database:
        results = [result for _, result in database.results]
    return len(results), [result.diff or "" for result in results if not result.is_killed]


def main(count: int, modules: list[str]) -> None:
    """Prints a line per module, the surviving mutants, and the score."""
    root = pathlib.Path(__file__).parents[1]
    tried = alive = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=root, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
        for module in modules or MODULES:
            total, survived = survivors(folder, module, count)
            tried, alive = tried + total, alive + len(survived)
            print(f"{module}: {total - len(survived)} of {total} mutants noticed", flush=True)
            for difference in survived:
                print(difference, flush=True)
    print(f"score {100 * (tried - alive) / tried:.0f} % of {tried} mutants")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8, sys.argv[2:])
