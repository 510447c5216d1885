"""Currencies of ISO 4217 and how many decimals their minor unit has.

The list is ours, so that an update of a package cannot change how an old invoice is rounded; a test compares it
with the package `iso4217`. Metals, bond-market units, test codes and "no currency" have no minor unit and are left
out: nothing is priced in them.
"""

from __future__ import annotations

from billing.core.errors import UnknownCurrencyError

_CODES_BY_EXPONENT = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    2: """
    AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF CHW
    CNY COP COU CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF
    IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK
    MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP
    SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD USN UYU UZS VED VES WST XAD XCD XCG
    YER ZAR ZMW ZWG
    """,
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}
EXPONENTS = {code: exponent for exponent, codes in _CODES_BY_EXPONENT.items() for code in codes.split()}


def get_exponent(currency: str) -> int:
    """Return the number of decimals of the currency's minor unit, e.g. 2 for USD, 0 for JPY, 3 for KWD.

    Raises UnknownCurrencyError, also for `usd`: codes are upper-case.
    """
    exponent = EXPONENTS.get(currency)
    if exponent is None:
        raise UnknownCurrencyError(f"{currency!r} is not an ISO 4217 currency with a minor unit, such as USD or CNY")
    return exponent
