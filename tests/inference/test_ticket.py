"""The ticket's form on the wire."""

from __future__ import annotations

import math

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine.types import Decoding, Embedding, Pooling, SamplingParams, Speculation, ThoughtBound
from inference.transport.ticket import Ticket, TicketError
from tests.inference.flow import ticket

pytestmark = pytest.mark.unit

SAMPLING = SamplingParams(
    temperature=0.0, top_k=1, seed=7, logit_bias=((5, -1.5), (6, float(2))), samplers=("top_k",), ignore_eos=True
)
THOUGHTS = {"num_tokens": 3, "start": "<t>", "end": "</t>", "end_tokens": [4, 5], "is_open": True}


def test_a_ticket_survives_the_way_through_bytes() -> None:
    sent = ticket(
        sampling=SAMPLING, stop=("\n\n", "é"), adapters=(("abc", 0.5),), cache_key="1:ff", stream=True, clamped=True
    )
    assert Ticket.parse(sent.header(), sent.prompt_bytes()) == sent


def test_how_thoughts_are_bounded_survives_the_way() -> None:
    bound = ThoughtBound(num_tokens=3, start="<t>", end="</t>", end_tokens=(4, 5), is_open=True)
    sent = ticket(sampling=SamplingParams(thoughts=bound))
    assert Ticket.parse(sent.header()).sampling.thoughts == bound
    assert orjson.loads(sent.header())["sampling"]["thoughts"] == THOUGHTS


def test_without_its_prompt_a_ticket_still_says_how_long_it_was() -> None:
    sent = ticket()
    read = Ticket.parse(sent.header())
    assert read.prompt == ()
    assert read.num_prompt_tokens == len(sent.prompt)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50))
def test_any_tokens_survive(tokens: list[int]) -> None:
    sent = ticket(prompt=tuple(tokens), num_prompt_tokens=len(tokens))
    assert Ticket.parse(sent.header(), sent.prompt_bytes()).prompt == tuple(tokens)


def test_the_header_holds_no_token_of_the_prompt() -> None:
    assert b'prompt":' not in ticket().header().replace(b"num_prompt_tokens", b"")


def _changed(**changes: object) -> bytes:
    values = orjson.loads(ticket().header())
    values.update(changes)
    return orjson.dumps({name: value for name, value in values.items() if value is not ...})


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x80\x04garbage",
        b"[]",
        b'"text"',
        _changed(v=2),
        orjson.dumps({"v": 1}),
        _changed(surprise=1),
        _changed(request_id=5),
        _changed(tenant_id="1"),
        _changed(tenant_id=True),
        _changed(created_at="now"),
        _changed(stream=1),
        _changed(cache_key=3),
        _changed(stop="\n"),
        _changed(stop=[1]),
        _changed(adapters=[1]),
        _changed(adapters=[["a", "b"]]),
        _changed(sampling=[]),
        _changed(sampling={"unknown": 1}),
        _changed(sampling={"temperature": "hot"}),
        _changed(sampling={"top_k": 1.5}),
        _changed(sampling={"seed": "x"}),
        _changed(sampling={"ignore_eos": 1}),
        _changed(sampling={"grammar": 1}),
        _changed(sampling={"thoughts": 3}),
        _changed(sampling={"thoughts": {"num_tokens": 3}}),
        _changed(sampling={"thoughts": {**THOUGHTS, "num_tokens": 1.5}}),
        _changed(sampling={"thoughts": {**THOUGHTS, "end_tokens": ["x"]}}),
        _changed(sampling={"thoughts": {**THOUGHTS, "surprise": 1}}),
        _changed(decoding=[]),
        _changed(decoding={"unknown": 1}),
        _changed(decoding={"slot_id": "0"}),
        _changed(decoding={"speculation": {"num_max": "4"}}),
        _changed(sampling={"samplers": "top_k"}),
    ],
)
def test_anything_else_is_refused(header: bytes) -> None:
    with pytest.raises(TicketError):
        Ticket.parse(header)


@pytest.mark.parametrize("prompt", [b"\x01", b"\x01\x00\x00\x00"])
def test_a_prompt_of_another_length_is_refused(prompt: bytes) -> None:
    with pytest.raises(TicketError):
        Ticket.parse(ticket().header(), prompt)


def test_token_ids_are_asked_for_in_the_header_only_where_somebody_wants_them() -> None:
    for name in ("return_tokens", "shares_prompt"):
        plain, wanted = ticket(), ticket(**{name: True})
        assert name.encode() not in plain.header()
        assert getattr(Ticket.parse(plain.header()), name) is False
        assert getattr(Ticket.parse(wanted.header()), name) is True


def test_a_token_that_is_banned_stays_banned_on_the_way() -> None:
    sampling = SamplingParams(logit_bias=((5, -math.inf), (6, 1.5)))
    assert Ticket.parse(ticket(sampling=sampling).header()).sampling == sampling


def test_tokens_to_be_shown_survive_and_are_whole_numbers() -> None:
    sent = ticket(sampling=SamplingParams(shown_tokens=(5, 7)))
    assert Ticket.parse(sent.header()).sampling == sent.sampling
    with pytest.raises(TicketError, match="whole numbers"):
        Ticket.parse(sent.header().replace(b"[5,7]", b'[5,"7"]'))


@pytest.mark.unit
def test_how_a_sequence_is_run_survives_and_is_absent_where_nothing_was_said() -> None:
    decoding = Decoding(
        context_shift=True, num_keep=-1, slot_id=0, speculation=Speculation(num_max=4), max_decode_seconds=2
    )
    assert Ticket.parse(ticket(decoding=decoding).header()).decoding == decoding
    assert b"decoding" not in ticket().header()


@pytest.mark.unit
def test_a_ticket_from_before_decoding_was_there_is_still_read() -> None:
    assert Ticket.parse(ticket().header()).decoding == Decoding()


@pytest.mark.unit
def test_what_is_to_be_embedded_survives_and_is_absent_where_text_is_wanted() -> None:
    wanted = Embedding(lengths=(2, 1), pooling=Pooling.LAST, normalize=-1, dimensions=64)
    sent = ticket(embedding=wanted)
    assert Ticket.parse(sent.header()).embedding == wanted
    assert b"embedding" not in ticket().header()
    assert Ticket.parse(ticket().header()).embedding is None
    for before, after in (
        (b"[2,1]", b'[2,"1"]'),
        (b'"last"', b'"worst"'),
        (b":64", b':"64"'),
        (b'"normalize"', b'"n"'),
    ):
        with pytest.raises(TicketError, match=r"embedded|whole numbers"):
            Ticket.parse(sent.header().replace(before, after))
