"""Login: staff only, and guessing is bounded."""

import pytest

from billing.admin import login
from tests.billing.house import create_staff

URL = "/admin/login/"


def attempt(client, name="fiona", password="wrong", address="192.0.2.1"):
    return client.post(URL, {"username": name, "password": password}, REMOTE_ADDR=address)


@pytest.fixture
def fiona(house):
    return create_staff("fiona", "Finance")


def test_staff_log_in(client, fiona):
    response = attempt(client, password="correct horse battery")
    assert response.status_code == 302
    assert client.get("/admin/").status_code == 200


def test_others_do_not(client, fiona):
    fiona.is_staff = False
    fiona.save()
    assert attempt(client, password="correct horse battery").status_code == 200


def test_guessing_is_stopped_even_for_the_right_password(client, fiona):
    for _ in range(login.PAIR_FAILURES_MAX):
        assert "Too many" not in attempt(client).content.decode()
    assert "Too many failed attempts" in attempt(client, password="correct horse battery").content.decode()


def test_stranger_does_not_lock_the_owner_out(client, fiona):
    for _ in range(login.PAIR_FAILURES_MAX + 1):
        attempt(client)
    assert attempt(client, password="correct horse battery", address="198.51.100.7").status_code == 302


def test_guessing_of_one_name_from_many_addresses_is_stopped(client, fiona, monkeypatch):
    monkeypatch.setattr(login, "NAME_FAILURES_MAX", 3)
    for number in range(3):
        attempt(client, name="Fiona ", address=f"192.0.2.{number}")
    response = attempt(client, password="correct horse battery", address="198.51.100.7")
    assert "Too many failed attempts" in response.content.decode()


def test_guessing_of_many_names_from_one_address_is_stopped(client, fiona, monkeypatch):
    monkeypatch.setattr(login, "ADDRESS_FAILURES_MAX", 3)
    for number in range(3):
        attempt(client, name=f"name-{number}")
    assert "Too many failed attempts" in attempt(client, password="correct horse battery").content.decode()
