"""explain: say why a block is a hit or a miss, and what to do about it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

from kvservice.cli import daemon
from kvservice.cli.findings import tell
from kvservice.cli.flags import Parser, add_daemon, daemon_config
from kvservice.cli.messages import as_plain
from kvservice.cli.words import foreign
from kvservice_proto.v1 import kvservice_pb2 as pb

HASH_BYTES = range(8, 65)
FINGERPRINT_BYTES = range(16, 65)


def parser() -> Parser:
    """The arguments of `kvservice explain`."""
    made = Parser("explain", "Say why a block is a hit or a miss, in each of your namespaces that knows its hash.")
    made.add_argument("hash", metavar="HASH", type=_hex_reader(HASH_BYTES), help="the block's hash, in hex")
    made.add_argument(
        "--fingerprint",
        metavar="HEX",
        type=_hex_reader(FINGERPRINT_BYTES),
        default=b"",
        help="ask about the namespace with this fingerprint only (kvservice stats --json lists them)",
    )
    made.add_argument("--json", action="store_true", help="print the daemon's answer and its wording as JSON")
    add_daemon(made)
    return made


def main(argv: Sequence[str]) -> int:
    """Print the explanations. Raises CommandFailedError where no daemon answers."""
    arguments = parser().read(argv)
    with daemon.admin(daemon_config(arguments)) as connection:
        explanations = list(connection.explain(arguments.hash, fingerprint=arguments.fingerprint))
    print(as_json(arguments.hash, explanations) if arguments.json else as_text(arguments.hash, explanations))
    return 0


def as_text(block_hash: bytes, explanations: Sequence[pb.Explanation]) -> str:
    """The explanations for people, one paragraph per namespace."""
    lines = [f"block {block_hash.hex()}"]
    for explanation in explanations:
        told = tell(explanation)
        lines.append("")
        if explanation.label or explanation.fingerprint:
            lines.append(f'in namespace "{foreign(explanation.label)}" (fingerprint {explanation.fingerprint.hex()})')
        lines += [f"  {line}" for line in (told.summary, *told.details, f"Next: {told.next_step}")]
    return "\n".join(lines)


def as_json(block_hash: bytes, explanations: Sequence[pb.Explanation]) -> str:
    """The explanations for programs: the daemon's fields under their own names, and the same words."""
    told = [
        {
            **as_plain(explanation),
            "finding": explanation.WhichOneof("finding"),
            "summary": tell(explanation).summary,
            "next_step": tell(explanation).next_step,
        }
        for explanation in explanations
    ]
    return json.dumps({"hash": block_hash.hex(), "explanations": told}, indent=2)


def _hex_reader(sizes_bytes: range) -> Callable[[str], bytes]:
    def read(text: str) -> bytes:
        try:
            value = bytes.fromhex(text.removeprefix("0x"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not hex: two digits 0-9 a-f for each byte") from None
        if len(value) not in sizes_bytes:
            bounds = f"{sizes_bytes.start} to {sizes_bytes.stop - 1}"
            raise argparse.ArgumentTypeError(f"{len(value)} bytes long; it must be {bounds} bytes, all of them")
        return value

    return read
