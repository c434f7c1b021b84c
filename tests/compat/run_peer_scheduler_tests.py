"""Run diffusers' own scheduler tests with our schedulers in the place of diffusers' classes.

    python tests/compat/run_peer_scheduler_tests.py --diffusers PATH [--scheduler lcm ...] [-- PYTEST_ARGUMENTS]

PATH is a checkout of https://github.com/huggingface/diffusers (its ``tests`` are not in the wheel); the class that is
replaced is that of the installed diffusers. Nothing is downloaded. Prints the counts and every test that fails, and
exits with 1 when one fails that is not expected to.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported

import pytest

FILES = {
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm_multi": "DPMSolverMultistepScheduler",
}
# The first two, the only ones for LCM, look at the peer's class hierarchy, not at what a scheduler does.
EXPECTED_TO_FAIL = {
    "test_deprecated_kwargs": "reads the class attribute _deprecated_kwargs",
    "test_getattr_is_correct": "calls register_to_config and expects a deprecation warning from attribute access",
    "test_variance": "calls the private method _get_variance",
    "test_beta_sigmas": "use_beta_sigmas is not supported",
    "test_timestep_type": "timestep_type continuous is not supported",
    "test_full_loop_with_lu_and_v_prediction": "use_lu_lambdas is not supported",
    "test_solver_order_and_type": "algorithm_type dpmsolver is not supported",
    "test_variance_type": "variance_type learned_range is not supported",
}


class Recorder:
    """Collects what pytest reports."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst outcome of a test's phases."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def run(checkout: Path, scheduler: str, pytest_arguments: list[str]) -> bool:
    """Run one file; print what came out; True when nothing failed that should not."""
    import diffusers

    import fourstroke.schedulers

    name = FILES[scheduler]
    ours = getattr(fourstroke.schedulers, name)
    setattr(diffusers, name, ours)
    setattr(diffusers.schedulers, name, ours)
    file = checkout / "tests" / "schedulers" / f"test_scheduler_{scheduler}.py"
    recorder = Recorder()
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(checkout), "-c", os.devnull]
    pytest.main([str(file), *options, *pytest_arguments], plugins=[recorder])
    failed = [test for test, outcome in recorder.outcomes.items() if outcome == "failed"]
    passed = sum(outcome == "passed" for outcome in recorder.outcomes.values())
    print(f"\n{name}: {passed} of {len(recorder.outcomes)} tests of {file.name} pass.")  # noqa: T201
    for test in failed:
        short = test.rsplit("::", 1)[-1]
        print(f"  failed: {short} ({EXPECTED_TO_FAIL.get(short, 'not expected')})")  # noqa: T201
    return bool(recorder.outcomes) and all(test.rsplit("::", 1)[-1] in EXPECTED_TO_FAIL for test in failed)


def main() -> int:
    """Parse the command line and run the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, metavar="PATH", help="a checkout of diffusers")
    parser.add_argument("--scheduler", choices=sorted(FILES), action="append", help="default: lcm")
    parser.add_argument("pytest_arguments", nargs="*", metavar="PYTEST_ARGUMENTS")
    arguments = parser.parse_args()
    if not (arguments.diffusers / "tests" / "schedulers").is_dir():
        parser.error(f"{arguments.diffusers} holds no tests/schedulers; give the root of a checkout of diffusers.")
    checkout = arguments.diffusers.resolve()
    return int(not all([run(checkout, name, arguments.pytest_arguments) for name in arguments.scheduler or ["lcm"]]))


if __name__ == "__main__":
    sys.exit(main())
