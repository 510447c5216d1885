"""The worked cases of `revshare_cases.json`, each through the one public function of `billing.core.revenue_share`.

The file holds inputs, expected values and the working by hand. A case is written here as the clauses of its
agreement and the facts of its period; nothing is computed in this file but a change of form.
"""

import json
from decimal import Decimal
from fractions import Fraction
from math import lcm
from pathlib import Path

import pytest

from billing.core.money import to_decimal
from billing.core.revenue_share import (
    Base,
    Deductions,
    Floor,
    Percent,
    PerToken,
    ShareFacts,
    SplitPool,
    compute_revenue_share,
)

CASES = {
    case["id"]: case
    for case in json.loads((Path(__file__).parent / "revshare_cases.json").read_text(encoding="utf-8"))["cases"]
}


def read_case(case_id):
    return CASES[case_id]["inputs"], CASES[case_id]["expected"]


def build_facts(figures, *, currency="USD", tokens=None):
    return ShareFacts(currency, {name: Decimal(amount) for name, amount in figures.items()}, tokens or {})


def format_royalties(result):
    return {payee: f"{to_decimal(money):f}" for payee, money in result.royalties.items()}


def format_number(result, name):
    return f"{result.get_number(name):.2f}"


def test_rs_01_percentage_of_gross():
    inputs, expected = read_case("RS-01")
    facts = build_facts({"gross": inputs["gross_ex_tax"]})
    result = compute_revenue_share([Base(), Percent({"owner": Decimal(inputs["rate"])})], facts)
    assert format_royalties(result) == {"owner": expected["royalty"]}


def test_rs_02_percentage_of_net_with_deductions():
    inputs, expected = read_case("RS-02")
    deductions = ("tax", "payment_fees", "provider_cost", "refunds_ex_tax")
    facts = build_facts({name: inputs[name] for name in ("billed_incl_tax", *deductions)})
    clauses = [Base("billed_incl_tax"), Deductions(deductions), Percent({"owner": Decimal(inputs["rate"])})]
    result = compute_revenue_share(clauses, facts)
    assert format_number(result, "net_base") == expected["net_base"]
    assert format_royalties(result) == {"owner": expected["royalty"]}


def test_rs_03_deductions_capped_at_a_share_of_gross():
    inputs, expected = read_case("RS-03")
    facts = build_facts({"gross": inputs["gross_ex_tax"], **inputs["deductions"]})
    clauses = [
        Base(),
        Deductions(tuple(inputs["deductions"]), cap_rate=Decimal(inputs["deductions_cap_pct"])),
        Percent({"owner": Decimal(inputs["rate"])}),
    ]
    result = compute_revenue_share(clauses, facts)
    assert format_number(result, "deductions_allowed") == expected["deductions_allowed"]
    assert format_number(result, "net_base") == expected["net_base"]
    assert format_royalties(result) == {"owner": expected["royalty"]}


def test_rs_04_per_token_rounded_once():
    inputs, expected = read_case("RS-04")
    facts = build_facts({}, tokens={"input": inputs["input_tokens"], "output": inputs["output_tokens"]})
    prices = {
        "input": Decimal(inputs["rate_in_per_million"]),
        "output": Decimal(inputs["rate_out_per_million"]),
    }
    result = compute_revenue_share([PerToken("owner", prices)], facts)
    assert result.claims["owner"] == Decimal(expected["unrounded"])
    assert format_royalties(result) == {"owner": expected["royalty"]}


def test_rs_23_lineage_additive():
    inputs, expected = read_case("RS-23")
    clauses = [Base(), *(Percent({share["payee"]: Decimal(share["rate"])}) for share in inputs["shares"])]
    result = compute_revenue_share(clauses, build_facts({"gross": inputs["gross"]}))
    assert format_royalties(result) == expected["royalty"]
    assert sum(result.claims.values()) == Decimal(expected["total"])
    assert result.retained == Decimal(inputs["gross"]) - Decimal(expected["total"])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_rs_36_last_cents(number):
    inputs, expected = read_case("RS-36")
    split = inputs["splits"][number]
    weights = [Fraction(weight) for weight in split["weights"]]
    scale = lcm(*(weight.denominator for weight in weights))
    payees = {f"payee {index}": int(weight * scale) for index, weight in enumerate(weights)}
    clauses = [Base("pool"), Percent({"pool": Decimal(1)}), SplitPool(payees)]
    result = compute_revenue_share(clauses, build_facts({"pool": split["amount"]}))
    assert list(format_royalties(result).values()) == expected["largest_remainder"][number]


def test_rs_37_no_rounding_per_request():
    inputs, expected = read_case("RS-37")
    facts = build_facts({}, tokens={"all": inputs["requests"] * inputs["tokens_each"]})
    result = compute_revenue_share([PerToken("owner", {"all": Decimal(inputs["price_per_million"])})], facts)
    assert format_royalties(result) == {"owner": expected["total"]}


def test_rs_39_loss_month_floored_at_zero():
    inputs, expected = read_case("RS-39")
    deductions = ("tax", "payment_fees", "provider_cost")
    terms = [Floor(), Percent({"owner": Decimal(inputs["rate"])})]
    facts = build_facts({name: inputs[name] for name in ("billed_incl_tax", *deductions)})
    loss = compute_revenue_share([Base("billed_incl_tax"), Deductions(deductions), *terms], facts)
    assert format_number(loss, "net_base") == expected["net"]
    assert format_royalties(loss) == {"owner": expected["royalty"]}
    after = compute_revenue_share([Base("net"), *terms], build_facts({"net": inputs["next_month_net"]}))
    assert format_royalties(after) == {"owner": expected["next_no_carry"]}
