"""Registers the marker of tests that compare with transformers."""


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "transformers: compares with transformers and torch (extra `parity`); run with `pytest -m transformers`",
    )
