"""No float and no rounding where money or quantities pass."""

import pytest

from tests.architecture.rules import REPOSITORY, Violation, find_floats, find_rounding, list_python_files

MONEY_ROOMS = ("billing/core", "billing/services", "billing/models", "metering/core", "gateway/contract")
ROUNDING_PLACE = "billing/core/money.py"


def test_money_and_quantities_know_no_float() -> None:
    files = list_python_files(*MONEY_ROOMS) + list_python_files("metering", recursive=False)
    found = [v for path in files for v in find_floats(path.read_text(), str(path.relative_to(REPOSITORY)))]

    assert files
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("expression", ["0.07", "1e3", "float(amount)", "sum(parts, 0.0)", "-1.5", "split(share=0.5)"])
def test_float_is_found(expression: str) -> None:
    found = find_floats(f"rate = 1\namount = {expression}\n", "billing/core/x.py")

    assert [violation.line for violation in found] == [2]


@pytest.mark.parametrize(
    "line",
    [
        "amount = Decimal('0.07')",
        "amount = 7",
        "text = '0.07'",
        "TIMEOUT_S = 0.5",
        "wait(time_s_max=30.0)",
        "def wait(a, /, b, timeout_s=0.5, *, delay_ms: float = 2.5): pass",
        "sleep(0.5)  # not money: seconds",
    ],
)
def test_exact_numbers_and_explained_floats_are_fine(line: str) -> None:
    assert find_floats(line, "billing/core/x.py") == []


def test_float_without_a_reason_is_found() -> None:
    assert find_floats("sleep(0.5)  # not money:\n", "billing/core/x.py")


def test_only_one_place_rounds() -> None:
    files = [*list_python_files("billing", "metering")]
    found = [
        violation
        for path in files
        if (name := str(path.relative_to(REPOSITORY))) != ROUNDING_PLACE
        for violation in find_rounding(path.read_text(), name)
    ]

    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("expression", ["amount.quantize(cent)", "round(amount, 2)"])
def test_rounding_is_found(expression: str) -> None:
    assert find_rounding(f"x = {expression}", "billing/x.py") == [
        Violation(
            "billing/x.py",
            1,
            f"{'quantize' if 'quantize' in expression else 'round'}(…) rounds by itself. "
            "Call billing.core.money: it is the one place that rounds, half away from zero.",
        )
    ]
