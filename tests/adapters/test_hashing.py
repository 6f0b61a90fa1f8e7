"""Block hashes: exact, chained, and different as soon as anything differs."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_adapters.hashing import BlockChain, fingerprint_of, weights_identity_of

pytestmark = pytest.mark.unit

FINGERPRINT = hashlib.sha256(b"a namespace").digest()
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)
SIZES = st.integers(1, 9)


def hashes(tokens: list[int], *, size: int = 4, fingerprint: bytes = FINGERPRINT) -> list[bytes]:
    return list(BlockChain(fingerprint, size, tokens).hashes)


def test_a_hash_is_sha256_over_parent_and_tokens() -> None:
    first = hashlib.sha256(FINGERPRINT + struct.pack("<4I", 1, 2, 3, 4)).digest()
    second = hashlib.sha256(first + struct.pack("<4I", 5, 6, 7, 8)).digest()
    assert hashes([1, 2, 3, 4, 5, 6, 7, 8, 9]) == [first, second]


@given(TOKENS, SIZES)
def test_there_is_one_hash_per_full_block(tokens: list[int], size: int) -> None:
    made = hashes(tokens, size=size)
    assert len(made) == len(tokens) // size
    assert len(set(made)) == len(made)


@given(TOKENS, st.lists(st.integers(0, 70), max_size=4), SIZES)
def test_growing_in_pieces_changes_nothing(tokens: list[int], cuts: list[int], size: int) -> None:
    chain = BlockChain(FINGERPRINT, size)
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for start, end in itertools.pairwise(bounds):
        chain.extend(tokens[start:end])
    assert list(chain.hashes) == hashes(tokens, size=size)
    assert list(chain.tokens) == tokens


@given(TOKENS.filter(bool), st.data(), SIZES)
def test_another_token_changes_its_block_and_all_after_it(tokens: list[int], data: st.DataObject, size: int) -> None:
    position = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens[:position], tokens[position] ^ 1, *tokens[position + 1 :]]
    before, after = hashes(tokens, size=size), hashes(other, size=size)
    changed = position // size
    assert before[:changed] == after[:changed]
    assert not set(before[changed:]) & set(after[changed:])


@given(TOKENS)
def test_another_fingerprint_changes_every_hash(tokens: list[int]) -> None:
    other = hashlib.sha256(b"another namespace").digest()
    assert not set(hashes(tokens)) & set(hashes(tokens, fingerprint=other))


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_number_that_is_no_token_id_leaves_the_chain_as_it_was(token: int) -> None:
    chain = BlockChain(FINGERPRINT, 2, [1, 2, 3])
    with pytest.raises(ValueError, match="token ids"):
        chain.extend([4, token])
    assert (list(chain.tokens), len(chain.hashes)) == ([1, 2, 3], 1)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="fingerprint has 3 bytes"):
        BlockChain(b"abc", 4)
    with pytest.raises(ValueError, match="tokens_per_block is 0"):
        BlockChain(FINGERPRINT, 0)


def test_a_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    one = {"model": "m", "rope": {"theta": 1e4, "type": "default"}, "shape": [2, 4]}
    other = {"shape": [2, 4], "rope": {"type": "default", "theta": 1e4}, "model": "m"}
    assert fingerprint_of(one) == fingerprint_of(other)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "m", "layers": 3},
        {"model": "n", "layers": 2},
        {"model": "m", "layers": "2"},
        {"model": "m", "layers": [2]},
        {"model": "m", "layers": 2, "salt": ""},
        {"model": "m", "layers": True},
    ],
)
def test_every_difference_shows_in_the_fingerprint(other: dict[str, object]) -> None:
    assert fingerprint_of({"model": "m", "layers": 2}) != fingerprint_of(other)


@pytest.mark.parametrize("value", [{1: "one"}, {"set": {1, 2}}, {"bytes": b"x"}, {"deep": [{"key": object()}]}])
def test_what_has_no_canonical_form_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        fingerprint_of(value)


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint_of({"theta": math.nan})


def test_the_weights_identity_follows_names_and_bytes(tmp_path: Path) -> None:
    seen = set()
    (tmp_path / "config.json").write_text("{}")
    for name, content in [("model.safetensors", b"ab"), ("model.safetensors", b"ac"), ("more.safetensors", b"ac")]:
        (tmp_path / name).write_bytes(content)
        identity = weights_identity_of(tmp_path)
        assert identity == weights_identity_of(str(tmp_path))
        seen.add(identity)
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    seen.add(weights_identity_of(tmp_path))
    (tmp_path / "README.md").write_text("changes nothing")
    seen.add(weights_identity_of(tmp_path))
    assert len(seen) == 4


def test_a_folder_without_weights_has_no_identity(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="nothing to identify the weights by"):
        weights_identity_of(tmp_path)
