"""What the ingress makes of its arguments and `user_config`, without Serve; with it: tests/app/test_serve.py."""

from __future__ import annotations

import warnings

import pytest

from app.config import AdmissionArgs
from engine.errors import ConfigError

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    from app.ingress.deployment import own_admission

ARGUMENTS = {"first": AdmissionArgs(max_queued_requests=7), "second": AdmissionArgs(), "open": None}


def test_without_more_admission_is_as_the_arguments_say_and_none_where_they_have_none() -> None:
    found = own_admission(ARGUMENTS, {})
    assert found.keys() == {"first", "second"}
    assert found["first"].max_queued_requests == 7


def test_user_config_replaces_the_arguments_of_the_model_that_it_names() -> None:
    given = {"second": AdmissionArgs.from_dict({"classes": {"chat": {"ttft_deadline_s": 2.0}}}, "admission")}
    found = own_admission(ARGUMENTS, given)
    assert found["second"].default_class == "chat"
    assert found["second"].classes["chat"].ttft_deadline_s == 2.0
    assert found["first"] == own_admission(ARGUMENTS, {})["first"]


@pytest.mark.parametrize(
    ("model_id", "why"), [("elsewhere", "is no model of this application"), ("open", "has admission: null")]
)
def test_admission_of_a_model_that_has_none_is_an_error(model_id: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"user_config.admission: '{model_id}' {why}"):
        own_admission(ARGUMENTS, {model_id: AdmissionArgs()})
