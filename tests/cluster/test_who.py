"""Who a job is for."""

import json

import pytest

from cluster import env, who


def test_a_submitted_job_is_for_whoever_submitted_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "Ray Node")
    monkeypatch.delenv(env.RAY_JOB_CONFIG, raising=False)
    assert who.submitter() == who.user() == "ray-node"
    monkeypatch.setenv(env.RAY_JOB_CONFIG, json.dumps({"runtime_env": {}, "metadata": {who.USER: "ann"}}))
    assert who.submitter() == "ann"
    for plain in ({}, {"metadata": None}, {"metadata": {"recipe": "support"}}):  # a plain `ray job submit`
        monkeypatch.setenv(env.RAY_JOB_CONFIG, json.dumps(plain))
        assert who.submitter() == "ray-node"


def test_an_account_without_a_name_is_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)
    assert who.user() == "uid-54321"
