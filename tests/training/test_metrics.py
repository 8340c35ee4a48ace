"""metrics.py: nothing doubled, nothing torn, nothing lost."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.training.metrics import MetricsWriter, host_metrics, read_metrics


def test_host_metrics_are_floats_from_one_transfer(monkeypatch):
    transfers = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: transfers.append(tree) or fetch(tree))
    metrics = host_metrics({"a": jnp.float32(0.5), "b": jnp.int32(3), "c": jnp.bfloat16(2), "d": True, "e": 1.5})
    assert metrics == {"a": 0.5, "b": 3.0, "c": 2.0, "d": 1.0, "e": 1.5}
    assert {type(v) for v in metrics.values()} == {float}
    assert len(transfers) == 1


def test_a_metric_with_a_device_axis_is_refused():
    with pytest.raises(ValueError, match=r"metric loss must be a scalar, got shape \(4,\).*unreplicate"):
        host_metrics({"loss": jnp.ones(4)})


def test_lines_are_on_disk_as_they_are_written_and_come_back(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"loss": 0.1, "nan": math.nan, "inf": math.inf, "minus": -math.inf}, stage="Überblick")
        lines = read_metrics(path)  # while still open
    assert math.isnan(lines[0].pop("nan"))
    assert lines == [{"step": 1, "stage": "Überblick", "loss": 0.1, "inf": math.inf, "minus": -math.inf}]
    text = path.read_text(encoding="utf-8")
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["nan"] == "nan"


@pytest.mark.parametrize(("resume_after", "kept"), [(None, 5), (0, 0), (3, 3), (9, 5)])
def test_resuming_drops_the_lines_behind_the_restored_step(tmp_path, resume_after, kept):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1 / step})
    straight = path.read_text()
    with MetricsWriter(path, resume_after=resume_after) as writer:
        for step in range(kept + 1, 6):
            writer.write(step, {"loss": 1 / step})
    assert path.read_text() == straight
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_left_out_and_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"step": 1, "loss": 0.5}\n{"step": 2, "text": "Ü'.encode()[:-1])
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]
    with MetricsWriter(path) as writer:
        writer.write(2, {"loss": 0.25})
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"Line 2 of .*metrics.jsonl is not a metrics line"):
        read_metrics(path)


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read from .*absent: No such file"):
        read_metrics(tmp_path / "absent")
    with pytest.raises(UserError, match=r"cannot be written to .*: Is a directory"):
        MetricsWriter(tmp_path)
    with MetricsWriter("/dev/full") as writer, pytest.raises(UserError, match=r"to /dev/full: No space left"):
        writer.write(1, {"loss": 0.5})
