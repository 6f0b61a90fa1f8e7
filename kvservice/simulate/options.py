"""options: the arguments of `kvservice simulate`, read and checked."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvservice.config import ADMISSIONS, parse_size
from kvservice.policies import POLICIES
from kvservice.simulate.engine import QUEUE_AWARE, Speeds
from kvservice.simulate.replay import ORACLE
from kvservice.simulate.requests import TRACE_BLOCK_TOKENS
from kvservice.simulate.workload import Workload

GENERATED = "generated"


@dataclass(frozen=True, slots=True)
class Options:
    """What to run. Sizes are blocks once the workload is known."""

    trace: str
    out: Path
    policies: tuple[str, ...]
    queue_windows: tuple[int, ...]
    dram_bytes: tuple[int, ...]
    dram_shares: tuple[float, ...]
    nvme_bytes: tuple[int, ...]
    is_timed: bool
    block_bytes: int
    block_tokens: int
    speeds: Speeds
    may_recompute: bool
    admission: str
    workload: Workload
    requests_max: int

    def dram_sizes(self, unique_blocks: int) -> list[int]:
        """Blocks of DRAM of each run; at least one."""
        sizes = [size_bytes // self.block_bytes for size_bytes in self.dram_bytes]
        return [max(1, size) for size in (*sizes, *(int(share * unique_blocks) for share in self.dram_shares))]

    def runs_of(self, policy: str) -> tuple[int, ...]:
        """The queue windows that make a difference to the policy."""
        if policy not in QUEUE_AWARE:
            return (0,)
        return tuple(
            window for window in self.queue_windows if window or policy != "lookahead" or self.queue_windows == (0,)
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every argument, with its default and unit."""
    speeds, workload = Speeds(), Workload()
    add = parser.add_argument
    add("--trace", default=GENERATED, metavar="FILE", help=f"Mooncake's JSON lines, or {GENERATED!r} (default)")
    add("--out", required=True, type=Path, metavar="DIR", help="where summary.json, table.txt and the plots go")
    add(
        "--policy",
        default="lru,lookahead,predictive",
        type=_policies,
        metavar="NAMES",
        help=f"of {', '.join(POLICIES)}, and {ORACLE} with --untimed; commas between (default: %(default)s)",
    )
    add(
        "--queue-window",
        default="-1",
        type=_each(int),
        metavar="REQUESTS",
        help="how much of the queue policies are told of: 0 nothing, -1 all that wait (timed only); commas between",
    )
    add("--dram", default=(), type=_each(parse_size), metavar="SIZES", help='such as "128GiB"; commas between')
    add(
        "--dram-share", default=(), type=_each(float), metavar="SHARES", help="of the unique blocks, in place of --dram"
    )
    add("--nvme", default="0", type=_each(parse_size), metavar="SIZES", help="0: no such tier (default)")
    add("--admission", default="all", choices=ADMISSIONS, help="what is written there: see nvme_admission")
    add("--untimed", action="store_true", help="replay blocks in the order of arrival, without time, queue or NVMe")
    add("--block-bytes", default="64MiB", type=parse_size, metavar="SIZE", help="of one block (default: %(default)s)")
    add("--block-tokens", default=0, type=int, metavar="TOKENS", help="512 for traces, 256 for generated (default)")
    add("--requests", default=0, type=int, metavar="COUNT", help="only the first so many of a trace; 0: all (default)")
    engine = parser.add_argument_group("the simulated engine and its devices").add_argument
    engine("--prefill-tokens-per-s", default=speeds.prefill_tokens_per_s, type=float, metavar="TOKENS")
    engine("--decode-step-ms", default=1e3 * speeds.decode_step_s, type=float, metavar="MS")
    engine("--batch", default=speeds.batch_max, type=int, metavar="REQUESTS")
    engine("--gpus", default=speeds.gpus, type=int, metavar="COUNT")
    engine("--dram-gb-per-s", default=speeds.dram_bytes_per_s / 1e9, type=float, metavar="GB")
    engine("--nvme-gb-per-s", default=speeds.nvme_bytes_per_s / 1e9, type=float, metavar="GB")
    engine("--may-recompute", action="store_true", help="compute what is held where PlanLoad says that it is faster")
    generated = parser.add_argument_group("the generated workload").add_argument
    generated("--conversations", default=workload.conversations, type=int, metavar="COUNT")
    generated("--per-second", default=workload.per_second, type=float, metavar="CONVERSATIONS")
    generated("--think-s", default=workload.think_s_mean, type=float, metavar="S")
    generated(
        "--context-tokens", default=0, type=int, metavar="TOKENS", help="the model's window; 0: endless (default)"
    )
    generated(
        "--without-truncation",
        action="store_true",
        help="a conversation that outgrows its window loses its blocks, as without the service's Truncate",
    )
    generated("--seed", default=workload.seed, type=int)


def read_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Options:
    """The options; a wrong one ends the process through `parser.error`."""
    if not arguments.dram and not arguments.dram_share:
        arguments.dram_share = (0.02, 0.05, 0.10)
    if arguments.untimed and -1 in arguments.queue_window:
        arguments.queue_window = tuple(window for window in arguments.queue_window if window >= 0) or (0,)
    if ORACLE in arguments.policy and not arguments.untimed:
        parser.error(f"--policy {ORACLE}: it knows the order of requests, which time changes: add --untimed")
    is_generated = arguments.trace == GENERATED
    positive = (
        *("prefill_tokens_per_s", "decode_step_ms", "batch", "gpus", "dram_gb_per_s", "nvme_gb_per_s", "block_bytes"),
        *("conversations", "per_second", "think_s"),
    )
    for name in positive:
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if any(not 0 < share <= 1 for share in arguments.dram_share) or min(arguments.queue_window) < -1:
        parser.error("--dram-share is above 0 and at most 1, --queue-window at least -1")
    if min(arguments.block_tokens, arguments.requests, arguments.context_tokens) < 0:
        parser.error("--block-tokens, --requests and --context-tokens are not negative")
    block_tokens = arguments.block_tokens or (Workload().block_tokens if is_generated else TRACE_BLOCK_TOKENS)
    if 0 < arguments.context_tokens < 4 * block_tokens:
        parser.error(f"--context-tokens must be 0 or at least four blocks, {4 * block_tokens}")
    return Options(
        trace=arguments.trace,
        out=arguments.out,
        policies=arguments.policy,
        queue_windows=arguments.queue_window,
        dram_bytes=arguments.dram,
        dram_shares=arguments.dram_share,
        nvme_bytes=(0,) if arguments.untimed else arguments.nvme,
        is_timed=not arguments.untimed,
        block_bytes=arguments.block_bytes,
        block_tokens=block_tokens,
        speeds=Speeds(
            prefill_tokens_per_s=arguments.prefill_tokens_per_s,
            decode_step_s=arguments.decode_step_ms / 1e3,
            batch_max=arguments.batch,
            gpus=arguments.gpus,
            dram_bytes_per_s=arguments.dram_gb_per_s * 1e9,
            nvme_bytes_per_s=arguments.nvme_gb_per_s * 1e9,
        ),
        may_recompute=arguments.may_recompute,
        admission=arguments.admission,
        workload=Workload(
            conversations=arguments.conversations,
            per_second=arguments.per_second,
            think_s_mean=arguments.think_s,
            block_tokens=block_tokens,
            context_tokens=arguments.context_tokens,
            keeps_truncated=not arguments.without_truncation,
            seed=arguments.seed,
        ),
        requests_max=arguments.requests,
    )


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    known = (*POLICIES, ORACLE)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} is not among {', '.join(known)}")
    return names


def _each(read_one: Callable[[str], object]) -> Callable[[str], tuple[object, ...]]:
    def read_all(text: str) -> tuple[object, ...]:
        try:
            return tuple(read_one(part) for part in text.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_all
