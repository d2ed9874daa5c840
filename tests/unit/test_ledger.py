"""What is booked for models, and how much one more may take."""

from __future__ import annotations

import pytest

from daemon.memory.ledger import Ledger, budget, watermark
from daemon.memory.measure import Use

GIB = 1024**3
NOBODY: frozenset[str] = frozenset()


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


def used(private: float, **files: float) -> Use:
    """What a process uses, in GiB."""
    return Use(
        private_bytes=int(private * GIB), files={key: int(f * GIB) for key, f in files.items()}
    )


# budget and watermark


def test_without_a_limit_models_may_take_the_ram_less_the_reserve():
    assert budget(None, 3 * GIB, 16 * GIB) == 13 * GIB


def test_without_a_reserve_2_gib_or_a_quarter_is_left_to_everything_else():
    assert budget(None, None, 16 * GIB) == 14 * GIB
    assert budget(None, None, 4 * GIB) == 3 * GIB


def test_the_reserve_is_not_taken_off_an_explicit_limit():
    assert budget(6 * GIB, 2 * GIB, 16 * GIB) == 6 * GIB
    assert budget(0, 2 * GIB, 16 * GIB) == 0


def test_a_reserve_larger_than_the_ram_leaves_nothing():
    assert budget(None, 2 * GIB, GIB) == 0


def test_the_watermark_is_1_gib_or_a_sixteenth():
    assert watermark(None, 64 * GIB) == GIB
    assert watermark(None, 4 * GIB) == GIB // 4
    assert watermark(123, 64 * GIB) == 123


# booking


def test_a_booking_counts_from_the_start_of_its_load(ledger):
    ledger.reserve("a", "first", 3 * GIB)
    assert ledger.reserved_bytes == 3 * GIB
    assert ledger.available_bytes() == 5 * GIB


def test_what_is_given_back_is_there_again(ledger):
    ledger.reserve("a", "first", 8 * GIB)
    assert ledger.available_bytes() == 0
    ledger.release("a")
    ledger.release("a")
    assert ledger.available_bytes() == 8 * GIB and ledger.reservations == {}


def test_what_would_be_there_without_some(ledger):
    ledger.reserve("a", "first", 5 * GIB)
    ledger.reserve("b", "second", 2 * GIB)
    assert ledger.book().room(NOBODY, ()) == GIB
    assert ledger.book().room({"a"}, ()) == 6 * GIB
    assert ledger.book().room({"a", "b", "gone long ago"}, ()) == 8 * GIB


# what is free


def test_what_others_use_of_the_ram_is_not_there(ledger, machine):
    machine.free_bytes = 2 * GIB
    assert ledger.available_bytes() == 2 * GIB


def test_the_watermark_is_left_alone(machine):
    machine.free_bytes = 4 * GIB
    assert Ledger(8 * GIB, machine, watermark_bytes=GIB).available_bytes() == 3 * GIB


def test_ram_that_a_load_under_way_has_not_touched_yet_is_spoken_for(ledger, machine):
    machine.free_bytes = 5 * GIB
    ledger.reserve("a", "first", 3 * GIB)
    assert ledger.available_bytes() == 2 * GIB  # the kernel still calls 5 GiB free
    ledger.measured("a", used(1))
    machine.free_bytes = 4 * GIB
    assert ledger.available_bytes() == 2 * GIB
    ledger.measured("a", used(3))
    machine.free_bytes = 2 * GIB
    assert ledger.available_bytes() == 2 * GIB


def test_mapped_weights_are_not_free_although_the_kernel_could_give_them_up(ledger, machine):
    machine.free_bytes = 4 * GIB
    ledger.reserve("a", "first", 3 * GIB, ["w"])
    ledger.measured("a", used(1, w=2))  # of the 4 GiB that the kernel calls available, 2 are these
    assert ledger.available_bytes() == 2 * GIB
    assert ledger.book().spare_bytes() == 2 * GIB


def test_an_evicted_model_s_own_memory_comes_back_to_the_machine(ledger, machine):
    machine.free_bytes = GIB
    ledger.reserve("a", "first", 3 * GIB, ["w"])
    ledger.measured("a", used(2, w=1))
    assert ledger.book().room(NOBODY, ()) == 0
    assert ledger.book().room({"a"}, ()) == 3 * GIB
    assert ledger.book().held_bytes({"a"}) == 3 * GIB


def test_available_is_never_negative(ledger, machine):
    ledger.reserve("a", "first", 6 * GIB)
    machine.free_bytes = GIB
    assert ledger.available_bytes() == 0
    ledger.measured("a", used(9))
    assert ledger.available_bytes() == 0


# files that several models map


def test_a_file_that_two_models_map_counts_once(ledger):
    ledger.reserve("a", "first", 3 * GIB, ["w"])
    ledger.measured("a", used(1, w=2))
    ledger.reserve("b", "second", 3 * GIB, ["w"])
    assert ledger.reserved_bytes == 4 * GIB  # also before the second one is measured
    ledger.measured("b", used(1, w=2))
    assert ledger.reserved_bytes == 4 * GIB


def test_a_load_gets_credit_for_what_is_in_memory_already(ledger):
    ledger.reserve("a", "first", 3 * GIB, ["w"])
    assert ledger.book().room(NOBODY, ["w"]) == 5 * GIB  # nobody knows yet that it will be there
    ledger.measured("a", used(1, w=2))
    assert ledger.book().room(NOBODY, ["w"]) == 7 * GIB
    assert ledger.book().room(NOBODY, ["other"]) == 5 * GIB
    assert ledger.book().room({"a"}, ["w"]) == 8 * GIB  # it would go with the one that leaves


def test_who_stays_holds_the_file_when_the_other_one_leaves(ledger):
    for name in ("a", "b"):
        ledger.reserve(name, name, 3 * GIB, ["w"])
        ledger.measured(name, used(1, w=2))
    ledger.release("a")
    assert ledger.reserved_bytes == 3 * GIB
    assert ledger.book().held_bytes({"b"}) == 3 * GIB


def test_evicting_one_of_two_gives_back_its_own_part_alone(ledger):
    for name in ("a", "b"):
        ledger.reserve(name, name, 3 * GIB, ["w"])
        ledger.measured(name, used(1, w=2))
    assert ledger.book().held_bytes({"a"}) == GIB
    assert ledger.book().held_bytes({"a", "b"}) == 4 * GIB
    assert ledger.book().room({"a"}, ()) == 5 * GIB


# measuring


def test_a_measurement_above_the_estimate_raises_the_booking(ledger):
    ledger.reserve("a", "first", 3 * GIB)
    ledger.measured("a", used(4))
    assert ledger.reservations["a"].reserved_bytes == 4 * GIB
    assert ledger.reservations["a"].estimate_bytes == 3 * GIB
    assert ledger.available_bytes() == 4 * GIB


def test_a_measurement_below_the_estimate_leaves_the_booking(ledger):
    ledger.reserve("a", "first", 3 * GIB)
    ledger.measured("a", used(1))
    assert ledger.reservations["a"].reserved_bytes == 3 * GIB
    assert ledger.reservations["a"].measured_bytes == GIB


def test_a_booking_never_shrinks_below_its_peak(ledger):
    ledger.reserve("a", "first", GIB, ["w"])
    for seen in (used(2), used(1, w=1), used(0), used(1)):
        ledger.measured("a", seen)
    assert ledger.reservations["a"].measured_bytes == 3 * GIB  # 2 of its own and 1 of the file
    assert ledger.reservations["a"].now == used(1)
    assert ledger.reserved_bytes == 3 * GIB


def test_growth_between_measurements_is_booked(ledger):
    ledger.reserve("a", "first", GIB)
    ledger.noted("a", GIB)  # it is still being loaded
    assert ledger.reservations["a"].measured_bytes == 0
    ledger.measured("a", used(1, w=1))
    ledger.noted("a", 3 * GIB)
    assert ledger.reservations["a"].measured_bytes == 4 * GIB
    assert ledger.reservations["a"].now.files == {"w": GIB}


def test_a_late_measurement_of_a_model_that_has_gone_books_nothing(ledger):
    ledger.reserve("a", "first", GIB)
    ledger.release("a")
    ledger.measured("a", used(1))
    ledger.noted("a", GIB)
    assert ledger.reservations == {} and ledger.reserved_bytes == 0


def test_memory_of_gpus_is_what_was_measured_else_what_was_estimated(ledger):
    ledger.reserve("a", "first", GIB, gpus={"gpu0": 5, "gpu1": 6})
    assert ledger.reservations["a"].gpus == {"gpu0": 5, "gpu1": 6}
    ledger.measured("a", Use(private_bytes=1, gpus={"gpu0": 7}))
    assert ledger.reservations["a"].gpus == {"gpu0": 7, "gpu1": 6}
