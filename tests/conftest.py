"""Eight emulated CPU devices for every test, and no silent rematerialisation in any."""

import os

# Tests compile much and compute little: less machine-code optimisation halves their time and changes no HLO pass.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import pytest

from shardtrain import select_devices

select_devices("cpu", emulate=8)

REMATERIALIZATION = "Involuntary full rematerialization"
#: Test names that may make XLA print it, each with the reason.
ALLOWED = {"test_the_warning_that_the_suite_looks_for_is_really_printed": "it provokes it"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fail a test during which XLA gave up on a sharding and made whole tensors instead (it says so on stderr)."""
    report = yield
    if report.when == "call" and report.passed and REMATERIALIZATION in report.capstderr and item.name not in ALLOWED:
        report.outcome = "failed"
        report.longrepr = f"XLA printed {REMATERIALIZATION!r}:\n{report.capstderr}"
    return report
