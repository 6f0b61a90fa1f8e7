"""The status page of a real daemon, in a real browser: readable on a phone, light and dark, and it tells no secrets."""

from __future__ import annotations

import struct
import zlib
from hashlib import sha256

import pytest

from tests.blocks import chain
from tests.daemons import DaemonProcess
from tests.operations.browser import Browser
from tests.operations.traffic import BLOCKS, MODEL, Engine, conversations
from tests.waiting import eventually

pytestmark = [pytest.mark.operations, pytest.mark.timeout(180)]

PHONE = 390
SECRET_SESSION = "session-of-somebody"


def pixels(png: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and the rows of a PNG that Chromium wrote (8 bits a channel, not interlaced), as RGB or RGBA."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert depth == 8
    channels = {2: 3, 6: 4}[kind]
    data, position = b"", 8
    while position < len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        if png[position + 4 : position + 8] == b"IDAT":
            data += png[position + 8 : position + 8 + length]
        position += 12 + length
    raw, stride = zlib.decompress(data), width * channels
    rows: list[bytes] = []
    before = bytearray(stride)
    for at in range(0, len(raw), stride + 1):
        row = _unfiltered(raw[at], bytearray(raw[at + 1 : at + 1 + stride]), before, channels)
        rows.append(bytes(row))
        before = row
    return width, height, rows


def _unfiltered(kind: int, row: bytearray, above: bytearray, channels: int) -> bytearray:
    for at in range(len(row)):
        left = row[at - channels] if at >= channels else 0
        corner = above[at - channels] if at >= channels else 0
        up = above[at]
        estimate = left + up - corner
        nearest = min((left, up, corner), key=lambda value: abs(estimate - value))
        row[at] = (row[at] + (0, left, up, (left + up) // 2, nearest)[kind]) & 255
    return row


def brightness(row: bytes) -> float:
    return sum(row) / len(row)


def test_a_browser_shows_it_light_dark_and_on_a_phone(daemon: DaemonProcess, browser: Browser) -> None:
    url = f"http://{daemon.http_address}/"
    with Engine(daemon.socket_dir) as engine:
        conversations(engine, count=8)
        eventually(lambda: "vllm-0" in daemon.get("/")[1] and "not_held" in daemon.get("/")[1])
        light = browser.picture(url, "light", width=1000, height=1300)
        dark = browser.picture(url, "dark", width=1000, height=1300, is_dark=True)
        phone = browser.picture(url, "phone", width=PHONE, height=1800)
        document = browser.document(url)
    # The last row is paper, without a word on it.
    assert brightness(pixels(light)[2][-1]) > 240
    assert brightness(pixels(dark)[2][-1]) < 90
    assert pixels(phone)[0] == PHONE
    for words in ("serving", "DRAM", "NVMe", "vllm-0", MODEL.label, "not_held"):
        assert words in document, words


def test_on_a_phone_nothing_is_wider_than_the_screen(daemon: DaemonProcess, browser: Browser) -> None:
    """Whatever overflowed would be painted beside the page's own width: the margin must stay paper."""
    with Engine(daemon.socket_dir, name="an engine with a very long name " * 3) as engine:
        conversations(engine, count=2)
        eventually(lambda: "very long name" in daemon.get("/")[1])
        _, _, rows = pixels(browser.picture(f"http://{daemon.http_address}/", "phone", width=500, height=2200))
    channels = len(rows[0]) // 500
    paper = rows[-1][:channels]
    margin = 12
    assert all(row[-margin * channels :] == paper * margin for row in rows)


def test_neither_page_nor_metrics_reveal_hashes_sessions_tokens_or_tenants(daemon: DaemonProcess) -> None:
    hashes = chain("chat 0", BLOCKS)
    with Engine(daemon.socket_dir) as engine:
        conversations(engine, count=3)
        engine.client.save(hashes, bytearray(BLOCKS * MODEL.block_size_bytes), session_id=SECRET_SESSION)
        eventually(lambda: "vllm-0" in daemon.get("/")[1])
        shown = daemon.get("/")[1] + daemon.get("/metrics")[1] + daemon.get("/livez")[1] + daemon.get("/readyz")[1]
    assert not [block for block in hashes if block.hex()[:12] in shown]
    assert SECRET_SESSION not in shown
    assert MODEL.fingerprint.hex()[:12] not in shown
    assert sha256(b"model").hexdigest()[:12] not in shown
    assert "uid:" not in shown
    # A name that a client chose never becomes a label.
    metrics = daemon.get("/metrics")[1]
    assert MODEL.label not in metrics
    assert "vllm-0" not in metrics
