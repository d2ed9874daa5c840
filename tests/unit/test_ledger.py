"""What is booked for models: whether one more fits, and what a refusal says."""

from __future__ import annotations

import pytest

from daemon.errors import InsufficientMemory
from daemon.memory.ledger import Ledger, budget

GIB = 1024**3


class Machine:
    """A machine whose free RAM a test sets."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes

    def __call__(self) -> int:
        return self.free_bytes


@pytest.fixture
def machine() -> Machine:
    return Machine(16 * GIB)


@pytest.fixture
def ledger(machine: Machine) -> Ledger:
    return Ledger(8 * GIB, machine)


def refusal(ledger: Ledger, size: int) -> InsufficientMemory:
    before = dict(ledger.reservations)
    with pytest.raises(InsufficientMemory) as error:
        ledger.reserve("x", "wanted", size)
    assert ledger.reservations == before
    return error.value


# budget


def test_without_a_limit_models_may_take_the_ram_less_the_reserve():
    assert budget(None, 2 * GIB, 16 * GIB) == 14 * GIB


def test_the_reserve_is_not_taken_off_an_explicit_limit():
    assert budget(6 * GIB, 2 * GIB, 16 * GIB) == 6 * GIB
    assert budget(0, 2 * GIB, 16 * GIB) == 0


def test_a_reserve_larger_than_the_ram_leaves_nothing():
    assert budget(None, 2 * GIB, GIB) == 0


# booking


def test_a_booking_counts_from_the_start_of_its_load(ledger):
    ledger.reserve("a", "first", 3 * GIB)
    assert ledger.reserved_bytes == 3 * GIB
    assert ledger.available_bytes() == 5 * GIB


def test_what_is_given_back_is_there_again(ledger):
    ledger.reserve("a", "first", 8 * GIB)
    refusal(ledger, 1)
    ledger.release("a")
    ledger.release("a")
    ledger.reserve("b", "second", 8 * GIB)
    assert set(ledger.reservations) == {"b"}


def test_the_whole_budget_can_be_booked_and_not_a_byte_more(ledger):
    ledger.reserve("a", "first", 8 * GIB - 1)
    refusal(ledger, 2)
    ledger.reserve("b", "second", 1)
    assert ledger.available_bytes() == 0


# what is free


def test_what_others_use_of_the_ram_is_not_there(ledger, machine):
    machine.free_bytes = 2 * GIB
    assert ledger.available_bytes() == 2 * GIB
    refusal(ledger, 2 * GIB + 1)
    ledger.reserve("a", "first", 2 * GIB)


def test_ram_that_a_load_under_way_has_not_touched_yet_is_spoken_for(ledger, machine):
    machine.free_bytes = 5 * GIB
    ledger.reserve("a", "first", 3 * GIB)
    assert ledger.available_bytes() == 2 * GIB  # the kernel still calls 5 GiB free
    ledger.measured("a", GIB)
    machine.free_bytes = 4 * GIB
    assert ledger.available_bytes() == 2 * GIB
    ledger.measured("a", 3 * GIB)
    machine.free_bytes = 2 * GIB
    assert ledger.available_bytes() == 2 * GIB


def test_available_is_never_negative(ledger, machine):
    ledger.reserve("a", "first", 6 * GIB)
    machine.free_bytes = GIB
    assert ledger.available_bytes() == 0
    ledger.measured("a", 9 * GIB)
    assert ledger.available_bytes() == 0


# measuring


def test_a_measurement_above_the_estimate_raises_the_booking(ledger):
    ledger.reserve("a", "first", 3 * GIB)
    ledger.measured("a", 4 * GIB)
    assert ledger.reservations["a"].reserved_bytes == 4 * GIB
    assert ledger.reservations["a"].estimate_bytes == 3 * GIB
    assert ledger.available_bytes() == 4 * GIB


def test_a_measurement_below_the_estimate_leaves_the_booking(ledger):
    ledger.reserve("a", "first", 3 * GIB)
    ledger.measured("a", GIB)
    assert ledger.reservations["a"].reserved_bytes == 3 * GIB
    assert ledger.reservations["a"].measured_bytes == GIB


def test_a_booking_never_shrinks_below_its_peak(ledger):
    ledger.reserve("a", "first", GIB)
    for seen in (2 * GIB, 3 * GIB, 0, GIB):
        ledger.measured("a", seen)
    assert ledger.reservations["a"].measured_bytes == 3 * GIB
    assert ledger.reserved_bytes == 3 * GIB


def test_a_late_measurement_of_a_model_that_has_gone_books_nothing(ledger):
    ledger.reserve("a", "first", GIB)
    ledger.release("a")
    ledger.measured("a", GIB)
    assert ledger.reservations == {} and ledger.reserved_bytes == 0


# refusals


def test_what_can_never_fit_says_so_with_both_numbers(ledger):
    error = refusal(ledger, 9 * GIB)
    assert "wanted needs 9.00 GiB" in error.message
    assert "8.00 GiB" in error.message and "[memory] limit" in error.message
    assert error.should_retry is False and error.retry_after_s is None
    assert (error.status, error.code) == (503, "insufficient_memory")


def test_what_does_not_fit_now_says_who_holds_the_memory_and_may_be_tried_again(ledger):
    ledger.reserve("a", "first", 4 * GIB)
    ledger.reserve("b", "second", 3 * GIB)
    ledger.measured("b", 3 * GIB + GIB // 2)
    error = refusal(ledger, 2 * GIB)
    assert "wanted needs 2.00 GiB" in error.message and "only 0.50 GiB is free" in error.message
    assert "first 4.00 GiB" in error.message and "second 3.50 GiB" in error.message
    assert error.retry_after_s is not None and error.retry_after_s > 0
    assert error.should_retry is None


def test_when_other_programs_hold_the_memory_it_says_that_no_model_does(ledger, machine):
    machine.free_bytes = GIB
    error = refusal(ledger, 2 * GIB)
    assert "only 1.00 GiB is free" in error.message and "no model is loaded" in error.message
    assert error.retry_after_s is not None


def test_too_large_for_the_budget_is_never_worth_a_retry_however_full_the_machine(ledger, machine):
    machine.free_bytes = 0
    assert refusal(ledger, 9 * GIB).should_retry is False
    assert refusal(ledger, 8 * GIB).should_retry is None
