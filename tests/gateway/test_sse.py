"""Framing of server-sent events, whatever the network does to them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sse import FrameSplitter, FrameTooLargeError, build_frame, get_frame_data, parse_frame

FRAMES = [
    b"data: {}\n\n",
    b"data:{}\n\n",
    b"data: {}\r\n\r\n",
    b": ping\n\n",
    b"id: 1\nevent: result\n:HTTP_STATUS/200\ndata: x\n\n",
    b"data: one\ndata: two\n\n",
    b"data: [DONE]\n\n",
    b"\n\n",
    b"data: " + b"x" * 70_000 + b"\n\n",
    "data: 你好🦙\n\n".encode(),
]


@given(st.lists(st.sampled_from(FRAMES), max_size=6), st.data())
def test_frames_come_out_whole_at_any_cut(frames, data):
    stream = b"".join(frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    splitter = FrameSplitter()
    got = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += splitter.split(stream[start:end])
    assert got == frames
    assert splitter.pending == b""


def test_a_blank_line_at_the_start_is_a_frame():
    assert FrameSplitter().split(b"\n\ndata: 1\n\n") == [b"\n\n", b"data: 1\n\n"]


def test_every_single_byte_cut():
    frames = [frame for frame in FRAMES if len(frame) < 1000]
    stream = b"".join(frames)
    splitter = FrameSplitter()
    got = [frame for position in range(len(stream)) for frame in splitter.split(stream[position : position + 1])]
    assert got == frames


def test_unfinished_frame_is_pending():
    splitter = FrameSplitter()
    assert splitter.split(b"data: 1\n\ndata: 2\n") == [b"data: 1\n\n"]
    assert splitter.pending == b"data: 2\n"


def test_endless_frame_is_refused():
    splitter = FrameSplitter(frame_bytes_max=100)
    assert splitter.split(b"x" * 100) == []
    with pytest.raises(FrameTooLargeError):
        splitter.split(b"x")


@pytest.mark.parametrize(
    ("frame", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b"data:  two blanks\n\n", b" two blanks"),
        (b"data: {}\r\n\r\n", b"{}"),
        (b"data: {}\r\n\n", b"{}"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"\ndata: x\n\n", b"x"),
        (b": comment\n\n", None),
        (b"event: x\n\n", None),
        (b"data:\n\n", b""),
        (b"data: \n\n", b""),
    ],
)
def test_frame_data(frame, data):
    assert get_frame_data(frame) == data


def test_event_name():
    event = parse_frame(b"id:1\nevent:error\n:HTTP_STATUS/400\ndata:{}\n\n")
    assert (event.event, event.data) == ("error", b"{}")
    assert parse_frame(b"data: 1\n\n").event == ""


def test_build_frame():
    assert build_frame(b"{}") == b"data: {}\n\n"
