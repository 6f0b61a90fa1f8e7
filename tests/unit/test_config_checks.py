"""Every bound is enforced by name, and what is printed or documented is what is in force."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.config import KNOBS, POLICIES, Config, ConfigError, Kind, NamespaceRule
from kvservice.config.fields import Knob
from kvservice.errors import StartupError
from kvservice.policies import POLICIES as IMPLEMENTED_POLICIES
from scripts import generate_config_doc

pytestmark = pytest.mark.unit


def load(
    flags: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None, *, config_file: str = ""
) -> Config:
    return Config.load(flags or {}, environ or {}, config_file=config_file)


# ------------------------------------------------------------------ validation


def bounded_knobs() -> list[tuple[Knob, float]]:
    """Each bound of each knob, with the nearest value outside."""
    outside = []
    for knob in KNOBS.values():
        if knob.kind in (Kind.INTEGER, Kind.SIZE, Kind.NUMBER, Kind.INTEGERS):
            step = 1e-6 if knob.kind is Kind.NUMBER else 1
            bounds = ((knob.at_least, -step), (knob.at_most, step))
            outside += [(knob, bound + away) for bound, away in bounds if abs(bound) != float("inf")]
    return outside


@pytest.mark.parametrize(("knob", "value"), bounded_knobs(), ids=lambda item: getattr(item, "name", str(item)))
def test_a_value_outside_its_bounds_is_refused_by_name(knob: Knob, value: float) -> None:
    wrong: object = value if knob.kind is Kind.NUMBER else int(value)
    changes = {knob.name: (wrong,) if knob.kind is Kind.INTEGERS else wrong}
    with pytest.raises(ConfigError, match=rf"^{knob.name}: .* is out of bounds: .*at (least|most)"):
        dataclasses.replace(Config(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"low_watermark": "0.95"}, "low_watermark .*0.95 is not below high_watermark"),
        ({"lease_s": "301"}, r"lease_s .*301.0 is more than lease_s_max \(300.0\)"),
        ({"policy": "lfu"}, "policy .*'lfu' is not one of fifo, lru, lookahead, predictive"),
        ({"log_level": "inf"}, "did you mean info"),
        ({"socket_dir": "run"}, "socket_dir .*'run' is not an absolute path"),
        ({"socket_dir": "/" + "x" * 100}, "socket_dir .*longer than 94 bytes"),
        ({"message_bytes_max": "64KiB"}, "message_bytes_max .*write at least 2MiB"),
        ({"hashes_per_call_max": "100000"}, "message_bytes_max: 8MiB does not fit hashes_per_call_max"),
        ({"tenants": "gid:1=a"}, "'gid:1' is not an identity"),
        ({"tenants": "uid:1="}, "'' is not a tenant name"),
        ({"tenants": "uid:1=" + "a" * 101}, "1 to 100 printable characters"),
        ({"tenants": "uid:1=a\tb"}, "printable"),
        ({"tcp_address": "0.0.0.0:9478"}, "mutual TLS: set tls_cert_file, tls_key_file, tls_client_ca_file"),
        ({"tcp_address": "0.0.0.0:9478", "tls_cert_file": "a", "tls_key_file": "b"}, "set tls_client_ca_file as well"),
        ({"tcp_address": "9478"}, 'not "host:port"'),
        ({"tcp_address": "host:70000"}, 'not "host:port"'),
        ({"tcp_address": "host:"}, 'not "host:port"'),
    ],
)
def test_what_does_not_fit_together_is_refused(flags: Mapping[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(flags)


def test_tcp_with_its_three_files_is_accepted() -> None:
    files = {"tls_cert_file": "/c", "tls_key_file": "/k", "tls_client_ca_file": "/a"}
    assert load({"tcp_address": "[::]:9478", **files}).tcp_address == "[::]:9478"


def test_the_object_is_frozen_through_and_through() -> None:
    config = load({"tenants": "uid:1=a"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dram_bytes = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.tenants["uid:2"] = "b"  # type: ignore[index]


def test_a_configuration_error_is_a_startup_error() -> None:
    assert issubclass(ConfigError, StartupError)


def test_the_policies_named_here_are_those_that_exist() -> None:
    assert set(POLICIES) == set(IMPLEMENTED_POLICIES)


# ------------------------------------------------------------------- documents

LABELS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20)


@given(
    dram_bytes=st.integers(4096, 1 << 50),
    lease_s=st.floats(0.01, 300),
    uids=st.lists(st.integers(0, 2**32 - 2), max_size=3).map(tuple),
    http_host=LABELS,
    tenants=st.dictionaries(PRINTABLE.map("cn:{}".format), PRINTABLE, max_size=3),
    globs=st.dictionaries(LABELS, st.integers(0, 1 << 40), max_size=3),
    huge=st.booleans(),
)
def test_the_printed_configuration_loads_as_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    dram_bytes: int,
    lease_s: float,
    uids: tuple[int, ...],
    http_host: str,
    tenants: dict[str, str],
    globs: dict[str, int],
    huge: bool,
) -> None:
    config = Config(
        dram_bytes=dram_bytes,
        dram_segment_bytes=4096,
        lease_s=lease_s,
        allowed_uids=uids,
        http_host=http_host,
        tenants=tenants,
        namespaces={
            glob: NamespaceRule(dram_quota_bytes=quota, nvme_quota_bytes=quota // 3, ttl_s=lease_s, policy="lru")
            for glob, quota in globs.items()
        },
        dram_huge_pages=huge,
    )
    path = tmp_path_factory.getbasetemp() / "printed.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    again = load(config_file=str(path))
    assert again == config
    assert list(again.namespaces) == list(config.namespaces), "the order of rules decides"


def test_the_printed_configuration_says_what_each_knob_does_and_where_its_value_came_from() -> None:
    printed = load({"dram_bytes": "8GiB"}, {"KVSERVICE_DRAIN_S": "5"}).to_toml()
    values = tomllib.loads(printed)
    assert values["dram_bytes"] == "8GiB"
    assert set(values) == {name for name, knob in KNOBS.items() if knob.kind is not Kind.RULES}
    lines = printed.splitlines()
    assert lines[lines.index('dram_bytes = "8GiB"') - 1].endswith("from --dram-bytes")
    assert lines[lines.index("drain_s = 5.0") - 1] == (
        "# seconds; at least 0, at most 3600; default 20.0; from KVSERVICE_DRAIN_S"
    )
    assert all(len(line) <= 120 for line in lines)


def test_every_knob_is_described() -> None:
    for knob in KNOBS.values():
        assert len(knob.about) > 20, knob.name
        assert knob.about.endswith("."), knob.name


def test_the_reference_page_is_current() -> None:
    committed = generate_config_doc.PAGE.read_text(encoding="utf-8")
    assert committed == generate_config_doc.page(), "run scripts/generate_config_doc.py"
