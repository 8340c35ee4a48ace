"""Without the packages of its extra a script says so in one line; that needs none of them."""

import importlib.metadata
import pathlib
import runpy

import pytest

from rlhf_jax.errors import UserError

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize(
    ("script", "package", "extra"),
    [("smart_home", "home-assistant-intents", "smart-home"), ("translation", "sacrebleu", "translation")],
)
def test_without_the_packages_the_script_names_the_extra(script, package, extra, monkeypatch, tmp_path):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    main = runpy.run_path(str(EXPERIMENTS / f"{script}.py"))["main"]
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=rf"`{package}`.*rlhf_jax\[{extra}\]"):
        main(["--out", str(tmp_path)])
