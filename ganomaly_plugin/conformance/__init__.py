"""One conformance suite for every detector, built in or yours: `bench test NAME`, or `run_checks(NAME)` from Python.

Each check asks one thing of a detector and answers passed, failed or exempt. An exemption has a reason: either the
check does not apply (no CUDA device here, an optional part is missing), or the detector's class declares it in
`conformance_exemptions`. A suite on cheap settings says that a detector behaves; it does not say that it is good.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ganomaly_plugin.conformance import checks_inputs, checks_results
from ganomaly_plugin.conformance.subject import Check, Exempt, Failed, Subject
from ganomaly_plugin.errors import FAULTS, BenchError, InvalidInput, check_known, one_line
from ganomaly_plugin.seeding import kept

_CHECKS: dict[str, Check] = {**checks_results.CHECKS, **checks_inputs.CHECKS}
#: What is asked, by the name of the check, in the order of running.
CHECKS: Mapping[str, str] = {name: str(check.__doc__).splitlines()[0] for name, check in _CHECKS.items()}


@dataclass(frozen=True)
class CheckResult:
    """The answer to one check.

    Attributes:
        check: Its name, a key of `CHECKS`.
        status: "passed", "failed" or "exempt".
        detail: One line: what was found; for a failure what was expected and what came; for an exemption the reason.
        seconds: How long it took; fits that several checks share count for the first of them.
    """

    check: str
    status: Literal["passed", "failed", "exempt"]
    detail: str
    seconds: float


def run_checks(name: str, hparams: dict[str, Any] | None = None, *, device: str = "cpu") -> Iterator[CheckResult]:
    """Run all `CHECKS` on a detector and yield each result as it comes; a check that fails does not stop the others.

    Args:
        name: A registered name or a class path `package.module:Class`.
        hparams: Hyperparameters; they come before the detector's own `conformance_hparams`, and those before its defaults.
        device: Where the detector fits and scores.

    Raises:
        InvalidInput: At once: the name, a hyperparameter or the device is not usable, the detector cannot be
            constructed, or it declares an exemption without a reason or for a check that does not exist.
    """
    subject = Subject(name, hparams or {}, device)
    for check, reason in subject.exemptions.items():
        check_known(f"check in conformance_exemptions of {name}", check, CHECKS)
        if not isinstance(reason, str) or not reason.strip():
            raise InvalidInput(f"The exemption of {name} from {check} has no reason. Write one: {{{check!r}: 'why'}}.")
    return _results(subject)


def _results(subject: Subject) -> Iterator[CheckResult]:
    for name, check in _CHECKS.items():
        if name in subject.exemptions:
            yield CheckResult(name, "exempt", " ".join(subject.exemptions[name].split()), 0.0)
            continue
        began = time.perf_counter()
        status, detail = _run(check, subject)
        yield CheckResult(name, status, " ".join(detail.split()), time.perf_counter() - began)


def _run(check: Check, subject: Subject) -> tuple[Literal["passed", "failed", "exempt"], str]:
    with kept(range(min(1, torch.cuda.device_count()))):
        try:
            return "passed", check(subject)
        except Exempt as reason:
            return "exempt", str(reason)
        except Failed as finding:
            return "failed", str(finding)
        except FAULTS as error:  # whatever a detector raises where it should not is its answer
            kind = f"{type(error).__name__}: " if isinstance(error, BenchError) else ""  # one_line names the others
            return "failed", f"raised {kind}{one_line(error)}"


__all__ = ["CHECKS", "CheckResult", "run_checks"]
