"""Who makes room for whom."""

from __future__ import annotations

from daemon.memory.plan import Occupant, Standing, Way, cheapest, decide


def occupant(name, size, standing=Standing.IDLE, **more):
    return Occupant(model_id=name, standing=standing, size_bytes=size, **more)


def room(free, occupants):
    """What a load could take: what is free, and what those that are gone held."""
    sizes = {each.model_id: each.size_bytes for each in occupants}
    return lambda gone: free + sum(sizes[name] for name in gone)


def decided(ladder, free, *occupants):
    return decide(ladder, room(free, occupants), occupants)


def test_what_fits_is_loaded():
    found = decided([5], 5, occupant("a", 3))
    assert (found.way, found.level, found.models) == (Way.FITS, 0, ())


def test_idle_models_are_evicted_for_what_does_not_fit():
    found = decided([5], 3, occupant("a", 3))
    assert (found.way, found.models) == (Way.EVICT, ("a",))


def test_what_is_leaving_already_is_waited_for_before_anybody_else_goes():
    found = decided([5], 3, occupant("a", 3), occupant("b", 3, Standing.GOING))
    assert (found.way, found.models) == (Way.WAIT, ("b",))


def test_a_smaller_load_at_once_comes_before_a_larger_one_later():
    found = decided([9, 5], 3, occupant("a", 3), occupant("b", 9, Standing.BUSY))
    assert (found.way, found.level, found.models) == (Way.EVICT, 1, ("a",))


def test_busy_models_are_waited_for():
    found = decided([9, 8], 3, occupant("a", 3), occupant("b", 6, Standing.BUSY))
    assert (found.way, found.level, found.models) == (Way.WAIT, 0, ("b",))


def test_pinned_models_are_not_waited_for():
    found = decided([9], 3, occupant("a", 6, Standing.FIXED))
    assert (found.way, found.level) == (Way.REFUSE, 0)


def test_what_is_being_loaded_is_waited_for_since_it_may_be_idle_then():
    found = decided([9], 3, occupant("a", 6, Standing.COMING))
    assert (found.way, found.models) == (Way.WAIT, ("a",))


def test_what_can_never_be_had_is_refused():
    assert decided([9, 8], 3, occupant("a", 2), occupant("b", 2, Standing.BUSY)).way is Way.REFUSE


def enough(need, occupants):
    return lambda gone: sum(o.size_bytes for o in occupants if o.model_id in gone) >= need


def chosen(need, *occupants):
    found = cheapest(occupants, enough(need, occupants))
    return None if found is None else set(found)


def test_nobody_has_to_go_for_nothing():
    assert chosen(0, occupant("a", 5)) == set()


def test_the_one_that_was_idle_for_longer_goes():
    assert chosen(5, occupant("a", 5, idle_s=10), occupant("b", 5, idle_s=100)) == {"b"}


def test_the_one_that_is_loaded_again_sooner_goes():
    assert chosen(5, occupant("a", 5, reload_s=30), occupant("b", 5, reload_s=2)) == {"b"}


def test_one_that_somebody_loaded_for_its_own_sake_goes_last():
    assert chosen(5, occupant("a", 5, kept=True), occupant("b", 5, reload_s=5)) == {"b"}


def test_one_large_model_goes_rather_than_many_small_ones_of_the_same_loss():
    small = [occupant(f"s{i}", 2, reload_s=1) for i in range(5)]
    assert chosen(10, *small, occupant("large", 10, reload_s=1)) == {"large"}


def test_what_turns_out_not_to_be_needed_stays():
    # the small one is the cheapest for its size, but the large one is needed and enough
    small, large = occupant("small", 4, reload_s=1), occupant("large", 9, reload_s=9)
    assert chosen(9, small, large) == {"large"}


def test_when_all_are_not_enough_nobody_goes():
    assert chosen(11, occupant("a", 5), occupant("b", 5)) is None
