"""The pure parts of the llama_cpp backend: slots and batches, the text of an answer, images."""

from __future__ import annotations

import base64
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends import images
from backends.contract import BackendError, Placement, TokenLogprob
from backends.llama_cpp.answer import AnswerText
from backends.llama_cpp.model import gpu_split
from backends.llama_cpp.slots import Image, Prompt, Slot, choose, common_prefix, fill

# which slot a prompt gets, and what is kept


def slot(sequence: int, tokens: list[int], last_used: int = 0) -> Slot:
    return Slot(sequence=sequence, tokens=tokens, last_used=last_used)


def prompt(*tokens: int) -> Prompt:
    return Prompt((list(tokens),))


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_common_prefix_is_as_long_as_can_be(held, wanted):
    length = common_prefix(held, wanted)
    assert held[:length] == wanted[:length]
    assert held[length : length + 1] != wanted[length : length + 1] or length == min(
        len(held), len(wanted)
    )


def test_the_last_token_of_a_prompt_is_always_read():
    chosen, kept = choose([slot(0, [1, 2, 3])], prompt(1, 2, 3))
    assert (chosen.sequence, kept) == (0, 2)


def test_a_conversation_goes_on_in_its_own_slot():
    slots = [slot(0, [1, 2, 9, 9], 5), slot(1, [1, 2, 3, 4], 1)]
    chosen, kept = choose(slots, prompt(1, 2, 3, 4, 5, 6))
    assert (chosen.sequence, kept) == (1, 4)


def test_a_common_system_prompt_does_not_cost_another_conversation_its_slot():
    slots = [slot(0, [1, 2, 3, *range(100, 150)], 7), slot(1, [], 0)]
    chosen, kept = choose(slots, prompt(1, 2, 3, 4, 5))
    assert (chosen.sequence, kept) == (1, 0)


def test_a_prompt_that_is_all_there_is_never_read_again():
    slots = [slot(0, [1, 2, 3, *range(100, 150)], 7), slot(1, [], 0)]
    chosen, kept = choose(slots, prompt(1, 2, 3, 4))
    assert (chosen.sequence, kept) == (0, 3)


def test_without_a_prefix_the_slot_unused_for_longest_is_taken():
    slots = [slot(0, [5], 3), slot(1, [6], 2), slot(2, [7], 4)]
    assert choose(slots, prompt(1, 2))[0].sequence == 1


def test_only_known_text_is_saved():
    assert not slot(0, []).saveable
    assert slot(0, [1]).saveable
    seen = slot(0, [1])
    seen.begin(Prompt(([1, 2], Image(chunk=None, tokens=4, positions=1), [3])), 1)
    fill([seen], 9)
    assert seen.saveable  # up to the image
    seen.take_image()
    fill([seen], 9)
    assert seen.tokens == [1, 2] and not seen.saveable


def test_a_slot_that_resumes_goes_on_like_any_other():
    resumed = slot(0, [])
    resumed.resume([1, 2, 3], 4)
    chosen, kept = choose([resumed, slot(1, [1], 1)], prompt(1, 2, 3, 4, 5))
    assert (chosen.sequence, kept, chosen.position, chosen.last_used) == (0, 3, 3, 4)
    chosen.begin(prompt(1, 2, 3, 4, 5), kept)
    assert [(share.tokens, share.position) for share in fill([chosen], 9)] == [([4, 5], 3)]


# what a batch reads


def started(sequence: int, *parts: list[int] | Image, kept: int = 0) -> Slot:
    found = Slot(sequence=sequence)
    found.begin(Prompt(parts), kept)
    return found


def test_answers_come_first_and_prompts_fill_the_batch():
    reading = started(0, list(range(10)))
    answering = started(1, [7])
    shares = fill([reading, answering], 6)
    assert [(s.slot.sequence, s.tokens, s.position, s.answered) for s in shares] == [
        (1, [7], 0, True),
        (0, [0, 1, 2, 3, 4], 0, False),
    ]
    (rest,) = fill([reading, answering], 6)
    assert (rest.tokens, rest.position, rest.answered) == ([5, 6, 7, 8, 9], 5, True)
    assert reading.tokens == list(range(10)) and not reading.unread


def test_a_full_batch_leaves_the_rest_for_the_next():
    slots = [started(0, [1, 2]), started(1, [3, 4])]
    assert [s.slot.sequence for s in fill(slots, 2)] == [0]
    assert [s.slot.sequence for s in fill(slots, 2)] == [1]


def test_only_what_is_not_kept_is_read():
    going_on = Slot(sequence=0, tokens=[1, 2, 3, 4])
    going_on.begin(Prompt(([1, 2, 9],)), 2)
    (share,) = fill([going_on], 8)
    assert (share.tokens, share.position) == ([9], 2)
    assert going_on.tokens == [1, 2, 9] and going_on.used == 3


def test_an_image_takes_cells_and_positions_and_ends_what_is_known():
    image = Image(chunk=object(), tokens=64, positions=8)
    asked = Prompt(([1, 2], image, [3]))
    assert asked.tokens == 67 and asked.reusable == [1, 2]
    looking = Slot(sequence=0)
    looking.begin(asked, 0)
    (before,) = fill([looking], 100)
    assert before.tokens == [1, 2] and not before.answered
    assert fill([looking], 100) == []
    assert looking.take_image() == (image, 2)
    (after,) = fill([looking], 100)
    assert (after.tokens, after.position, after.answered) == ([3], 10, True)
    assert looking.used == 67 and looking.tokens == [1, 2]
    assert looking.take_image() is None


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 16))
def test_every_token_is_read_once_and_in_order(lengths, room):
    slots = [started(n, list(range(length))) for n, length in enumerate(lengths)]
    read: dict[int, list[int]] = {n: [] for n in range(len(lengths))}
    while shares := fill(slots, room):
        assert sum(len(share.tokens) for share in shares) <= room
        for share in shares:
            assert share.position == len(read[share.slot.sequence])
            read[share.slot.sequence] += share.tokens
    assert read == {n: list(range(length)) for n, length in enumerate(lengths)}


# the text of an answer, with log-probabilities


def entry(piece: bytes) -> TokenLogprob:
    return TokenLogprob(token=piece.decode("utf-8", "replace"), logprob=-1.0, bytes=tuple(piece))


def said(pieces: list[bytes], *stops: str) -> list[tuple[str, list[bytes]]]:
    """Each delta's text and the bytes of the tokens that it has entries of."""
    text = AnswerText(stops)
    deltas = []
    for piece in pieces:
        deltas.append(text.feed(piece, entry(piece)))
        if text.stopped:
            break
    deltas.append(text.flush())
    return [(d.content, [bytes(e.bytes) for e in d.logprobs]) for d in deltas if d is not None]


def test_a_token_s_entry_comes_with_its_text():
    assert said([b"one", b" two"]) == [("one", [b"one"]), (" two", [b" two"])]


def test_a_character_over_tokens_has_all_their_entries():
    llama = "🦙".encode()
    pieces = [b"a", llama[:1], llama[1:3], llama[3:], b"b"]
    assert said(pieces) == [("a", [b"a"]), ("🦙", pieces[1:4]), ("b", [b"b"])]


def test_a_stop_sequence_over_tokens_leaves_no_entry():
    assert said([b"yes", b" EN", b"D", b"more"], " END") == [("yes", [b"yes"])]


def test_what_was_held_back_in_vain_comes_with_its_entries():
    assert said([b"yes", b" EN", b"T"], " END") == [("yes", [b"yes"]), (" ENT", [b" EN", b"T"])]
    assert said([b"yes", b" EN"], " END") == [("yes", [b"yes"]), (" EN", [b" EN"])]


def test_a_token_that_a_stop_sequence_splits_is_part_of_the_answer():
    assert said([b"yes.E", b"ND"], "END") == [("yes.", []), ("", [b"yes.E"])]


def test_an_answer_cut_off_within_a_character_keeps_the_entry():
    cut = "é".encode()[:1]
    assert said([b"a", cut]) == [("a", [b"a"]), ("", [cut])]


@given(
    st.text(max_size=30), st.lists(st.integers(1, 4), min_size=1), st.sampled_from(["", "a", "é"])
)
@example("0é\x80", [2], "é")
def test_no_token_of_the_answer_loses_its_entry(text, sizes, stop):
    raw, pieces = text.encode("utf-8", "replace"), []
    while raw:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(raw[:size])
        raw = raw[size:]
    deltas = said(pieces, *([stop] if stop else []))
    content = "".join(text for text, _ in deltas)
    entries = b"".join(b for _, found in deltas for b in found)
    whole = text.encode("utf-8", "replace").decode()
    assert content == (whole.split(stop)[0] if stop else whole)
    assert entries.startswith(content.encode())
    if not stop or stop not in whole:
        assert entries == b"".join(pieces)


# images in messages


def part(data: bytes, *, url: str = "") -> dict:
    found = url or f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": found}}


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + bytes(9)


def jpeg(width: int, height: int) -> bytes:
    extra = b"\xff\xe0" + struct.pack(">H", 10) + bytes(8) + b"\xff"
    return b"\xff\xd8" + extra + b"\xff\xc0" + struct.pack(">HBHH", 17, 8, height, width)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height)


def bmp(width: int, height: int) -> bytes:
    return b"BM" + bytes(16) + struct.pack("<ii", width, -height)


@pytest.mark.parametrize("made", [png, jpeg, gif, bmp])
def test_an_image_of_a_known_kind_is_taken_if_it_is_not_too_large(made):
    assert images.data_of(part(made(640, 480))) == made(640, 480)
    with pytest.raises(BackendError, match="60000 by 6000 pixels"):
        images.data_of(part(made(60_000, 6_000)))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (part(b"", url="https://example.org/a.png"), "data URL"),
        (part(b"", url="data:image/png,abc"), "base64"),
        (part(b"", url="data:image/png;base64,####"), "not valid base64"),
        ({"type": "image_url"}, "data URL"),
        ({"type": "image_url", "image_url": {"url": 5}}, "data URL"),
        (part(b"just text"), "PNG, JPEG, GIF or BMP"),
        (part(png(1, 1)[:20]), "PNG, JPEG, GIF or BMP"),
        (part(png(0, 5)), "0 by 5 pixels"),
        (part(b"\xff\xd8\xff\xd9"), "PNG, JPEG, GIF or BMP"),
    ],
)
def test_anything_else_is_refused_and_the_text_says_why(wrong, words):
    with pytest.raises(BackendError, match=words) as refused:
        images.data_of(wrong)
    assert refused.value.code == "invalid_request"


def test_an_image_over_20_mb_is_refused_before_it_is_decoded():
    with pytest.raises(BackendError, match="at most 20000000"):
        images.data_of(part(b"", url="data:image/png;base64," + "A" * 26_700_000))


@given(st.binary(max_size=60))
def test_no_bytes_make_the_size_reader_fail(raw):
    for head in (b"", b"\xff\xd8\xff", b"GIF89a", b"BM", b"\x89PNG\r\n\x1a\n"):
        try:
            images.data_of(part(head + raw))
        except BackendError as error:
            assert error.code == "invalid_request"


# where layers go


def test_shares_are_in_the_order_of_the_pci_addresses(tmp_path):
    for address in ("0000:41:00.0", "0000:01:00.0"):
        (tmp_path / address).mkdir()
    where = Placement(gpu_layers=30, layers=(("0000:41:00.0", 10), ("0000:01:00.0", 20)))
    assert gpu_split(where, tmp_path) == (30, (20.0, 10.0))
    assert gpu_split(where, tmp_path / "none") == (30, (10.0, 20.0))
    assert gpu_split(Placement(), tmp_path)[0] == 0
    other = Placement(gpu_layers=1, layers=(("0000:99:00.0", 1),))
    with pytest.raises(BackendError, match="0000:99:00.0"):
        gpu_split(other, tmp_path)


def test_a_png_that_hides_its_size_behind_another_chunk_is_refused():
    """Decoders skip a CgBI chunk, and so would read a size that nobody has checked."""
    size = (1).to_bytes(4, "big") * 2
    hidden = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x08CgBI" + size + b"\x00" * 40
    url = f"data:image/png;base64,{base64.b64encode(hidden).decode()}"
    with pytest.raises(BackendError, match="not a whole PNG"):
        images.data_of({"image_url": {"url": url}})


def test_the_images_of_a_request_are_bounded_together():
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"
    big = header + (6000).to_bytes(4, "big") + (6000).to_bytes(4, "big") + b"\x00" * 40
    url = f"data:image/png;base64,{base64.b64encode(big).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    images.check([{"content": [part]}])
    with pytest.raises(BackendError, match="72000000 pixels together"):
        images.check([{"content": [part]}, {"content": [part]}])
    small = header + (1).to_bytes(4, "big") * 2 + b"\x00" * 40
    url = f"data:image/png;base64,{base64.b64encode(small).decode()}"
    with pytest.raises(BackendError, match="at most 16 images, not 17"):
        images.check([{"content": [{"type": "image_url", "image_url": {"url": url}}] * 17}])
