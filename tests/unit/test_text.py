"""StopScanner: an answer's text, whatever its bytes were cut into.

The text ends where the first stop sequence is complete: an engine that feeds single tokens can't
have gone any further, so larger pieces must not give another answer.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends.text import StopScanner

# few letters, so that stops are met; some of 2, 3 and 4 bytes, so that pieces cut through them
TEXTS = st.text(alphabet="ab\nÜ語🙂", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\nÜ語🙂", max_size=4), max_size=4)


def cut(text: str, stops: list[str]) -> str:
    """Return `text` up to the stop sequence that is complete first (of several, the longest)."""
    found = [stop for stop in stops if stop and stop in text]
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in found]
    return text[: min(ends)[1]] if ends else text


@st.composite
def pieces(draw, texts=TEXTS):
    """A text and its UTF-8 bytes in pieces of any length, empty ones too."""
    text = draw(texts)
    data = text.encode()
    places = draw(st.lists(st.integers(0, len(data)), max_size=12).map(sorted))
    bounds = [0, *places, len(data)]
    return text, [data[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def whole(scanner: StopScanner, fed: list[bytes]) -> str:
    return "".join(scanner.feed(piece) for piece in fed) + scanner.flush()


@given(pieces(), STOPS)
@example(("abc", [b"abc"]), ["abc", "b"])
@example(("abc", [b"a", b"b", b"c"]), ["abc", "b"])
@example(("ab", [b"ab"]), ["b", "ab"])
@example(("aab", [b"a", b"a", b"b"]), ["ab"])
def test_the_text_is_cut_at_the_stop_that_is_complete_first(cut_up, stops):
    text, fed = cut_up
    scanner = StopScanner(stops)
    assert whole(scanner, fed) == cut(text, stops)
    assert scanner.stopped == any(stop and stop in text for stop in stops)
    assert text.startswith(cut(text, stops) + scanner.stopped_by)
    assert scanner.stopped_by in ("", *stops)


@given(pieces(), STOPS)
@example(("abb", [b"abb"]), ["abb", "b"])
def test_how_the_bytes_were_cut_up_makes_no_difference(cut_up, stops):
    text, fed = cut_up
    single = [bytes([byte]) for byte in text.encode()]
    assert whole(StopScanner(stops), fed) == whole(StopScanner(stops), single)


@given(pieces(texts=st.text(max_size=30)))
def test_without_stops_all_text_passes_unchanged(cut_up):
    text, fed = cut_up
    assert whole(StopScanner([]), fed) == text


@given(pieces(), STOPS)
def test_only_what_may_become_a_stop_is_held_back(cut_up, stops):
    _, fed = cut_up
    scanner = StopScanner(stops)
    seen, passed = b"", ""
    for piece in fed:
        passed += scanner.feed(piece)
        seen += piece
        if scanner.stopped:
            break
        certain = seen.decode("utf-8", "ignore")  # whole characters only
        assert certain.startswith(passed)
        held = certain.removeprefix(passed)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@given(pieces(), STOPS)
def test_nothing_follows_a_stop(cut_up, stops):
    _, fed = cut_up
    scanner = StopScanner(stops)
    for piece in fed:
        scanner.feed(piece)
        if scanner.stopped:
            assert scanner.feed(b"more") == ""
            assert scanner.flush() == ""
            return


@pytest.mark.parametrize("text", ["é", "語", "🙂", "👩‍👩‍👧"])
def test_a_character_comes_whole_or_not_at_all(text):
    scanner = StopScanner([])
    fed = [scanner.feed(bytes([byte])) for byte in text.encode()]
    assert "".join(fed) == text
    assert "\ufffd" not in "".join(fed)


def test_a_character_that_the_end_cut_off_is_dropped():
    scanner = StopScanner([])
    assert scanner.feed("ab🙂".encode()[:-1]) == "ab"
    assert scanner.flush() == ""


def test_bytes_that_are_no_text_are_shown_as_such():
    assert whole(StopScanner([]), [b"a\xff", b"b"]) == "a\ufffdb"


def test_text_passes_at_once_when_it_can_no_longer_become_a_stop():
    scanner = StopScanner(["</end>"])
    assert scanner.feed(b"one <") == "one "
    assert scanner.feed(b"/en") == ""
    assert scanner.feed(b"try> two") == "</entry> two"
    assert not scanner.stopped


def test_what_was_held_back_comes_with_the_end():
    scanner = StopScanner(["\n\nUser:"])
    assert scanner.feed(b"bye\n\nUs") == "bye"
    assert scanner.flush() == "\n\nUs"
    assert scanner.flush() == ""


def test_an_empty_stop_is_no_stop():
    scanner = StopScanner(["", "x"])
    assert whole(scanner, [b"ab", b"c"]) == "abc"
    assert not scanner.stopped
