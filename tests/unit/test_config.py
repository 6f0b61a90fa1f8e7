"""Sizes are read exactly, later sources win, unknown names get a suggestion."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.config import Config, ConfigError, Kind, NamespaceRule, format_size, parse_size
from kvservice.config.values import MalformedError, from_text

pytestmark = pytest.mark.unit

SIZES = st.integers(min_value=0, max_value=1 << 60)
FACTORS = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


def load(
    flags: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None, *, config_file: str = ""
) -> Config:
    return Config.load(flags or {}, environ or {}, config_file=config_file)


@pytest.fixture
def write_toml(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "kvservice.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# ---------------------------------------------------------------------- values


@given(SIZES)
def test_a_formatted_size_reads_back_exactly(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(number=st.integers(0, 1 << 40), unit=st.sampled_from(sorted(FACTORS)), space=st.sampled_from(["", " ", "  "]))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str, space: str) -> None:
    for written in (unit, unit.lower(), unit.upper()):
        assert parse_size(f" {number}{space}{written} ") == number * FACTORS[unit]


@given(st.integers(0, 1 << 20), st.integers(0, 1023))
def test_a_fraction_is_taken_where_it_is_whole_bytes(gibibytes: int, part: int) -> None:
    assert parse_size(f"{gibibytes + part / 1024}GiB") == (gibibytes * 1024 + part) * 1024**2


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_is_refused(text: str) -> None:
    with contextlib.suppress(MalformedError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4GB", "write 4GiB"),
        ("512m", "write 512MiB"),
        ("1.5kb", "write 1.5KiB"),
        ("4 bananas", "bananas is not a unit"),
        ("-1", "is not a size"),
        ("", "is not a size"),
        ("1e9", "is not a size"),
        ("0.3B", "not a whole number of bytes"),
        ("9" * 40, "is not a size"),
        ("٣GiB", "is not a size"),
    ],
)
def test_a_wrong_size_says_what_to_write(text: str, says: str) -> None:
    with pytest.raises(MalformedError, match=says):
        parse_size(text)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Kind.BOOLEAN, " Yes ", True),
        (Kind.BOOLEAN, "off", False),
        (Kind.INTEGER, "-1", -1),
        (Kind.INTEGER, "65_536", 65_536),
        (Kind.NUMBER, "2.5", 2.5),
        (Kind.INTEGERS, "", ()),
        (Kind.INTEGERS, "0, 1000,", (0, 1000)),
        (Kind.PAIRS, "uid:1000=a, cn:ops=b", {"uid:1000": "a", "cn:ops": "b"}),
        (Kind.TEXT, " kept ", " kept "),
    ],
)
def test_text_becomes_the_kind(kind: Kind, text: str, value: object) -> None:
    assert from_text(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Kind.BOOLEAN, "maybe"),
        (Kind.INTEGER, "1.5"),
        (Kind.INTEGER, "0x10"),
        (Kind.INTEGER, "1_"),
        (Kind.NUMBER, "nan"),
        (Kind.NUMBER, "inf"),
        (Kind.NUMBER, "30s"),
        (Kind.INTEGERS, "1,two"),
        (Kind.PAIRS, "uid:1000"),
        (Kind.RULES, "llama*=1GiB"),
    ],
)
def test_text_of_another_kind_is_refused(kind: Kind, text: str) -> None:
    with pytest.raises(MalformedError):
        from_text(kind, text)


# --------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("in_file", "in_environment", "in_flags", "expected_s", "origin"),
    [
        (False, False, False, 20.0, "default"),
        (True, False, False, 1.0, "file"),
        (False, True, False, 2.0, "KVSERVICE_DRAIN_S"),
        (False, False, True, 3.0, "--drain-s"),
        (True, True, False, 2.0, "KVSERVICE_DRAIN_S"),
        (True, False, True, 3.0, "--drain-s"),
        (False, True, True, 3.0, "--drain-s"),
        (True, True, True, 3.0, "--drain-s"),
    ],
)
def test_later_sources_win(
    tmp_path: Path, *, in_file: bool, in_environment: bool, in_flags: bool, expected_s: float, origin: str
) -> None:
    path = tmp_path / "daemon.toml"
    path.write_text("drain_s = 1" if in_file else "", encoding="utf-8")
    config = Config.load(
        {"drain_s": "3"} if in_flags else {},
        {"KVSERVICE_DRAIN_S": "2"} if in_environment else {},
        config_file=str(path),
    )
    assert config.drain_s == expected_s
    assert config.origin("drain_s").split()[0] == origin


def test_the_file_is_named_by_flag_before_environment(tmp_path: Path) -> None:
    for name, drain_s in (("flag", 1), ("variable", 2)):
        (tmp_path / name).write_text(f"drain_s = {drain_s}", encoding="utf-8")
    environ = {"KVSERVICE_CONFIG": str(tmp_path / "variable")}
    assert Config.load({}, environ).drain_s == 2
    assert Config.load({}, environ, config_file=str(tmp_path / "flag")).drain_s == 1


def test_the_socket_directory_follows_the_runtime_directory_unless_set() -> None:
    assert load().socket_dir == "/run/kvservice"
    assert load(environ={"XDG_RUNTIME_DIR": ""}).socket_dir == "/run/kvservice"
    environ = {"XDG_RUNTIME_DIR": "/run/user/7"}
    assert load(environ=environ).socket_dir == "/run/user/7/kvservice"
    assert load(environ=environ).origin("socket_dir") == "XDG_RUNTIME_DIR"
    assert load(environ={**environ, "KVSERVICE_SOCKET_DIR": "/srv/kv"}).socket_dir == "/srv/kv"
    assert load({"socket_dir": "/flag"}, {**environ, "KVSERVICE_SOCKET_DIR": "/srv/kv"}).socket_dir == "/flag"


def test_every_kind_of_value_is_read_from_toml(write_toml: Callable[[str], str]) -> None:
    config = load(
        config_file=write_toml(
            """
            dram_bytes = "8GiB"
            dram_segment_bytes = 134217728
            dram_huge_pages = false
            allowed_uids = [0, 1000]
            lease_s = 12
            policy = "lru"
            [tenants]
            "uid:1000" = "team-a"
            [namespaces."llama*"]
            dram_quota_bytes = "2GiB"
            """
        )
    )
    assert (config.dram_bytes, config.dram_segment_bytes) == (8 << 30, 128 << 20)
    assert config.allowed_uids == (0, 1000)
    assert config.lease_s == 12.0
    assert config.dram_huge_pages is False
    assert dict(config.tenants) == {"uid:1000": "team-a"}
    assert dict(config.namespaces) == {"llama*": NamespaceRule(dram_quota_bytes=2 << 30, policy="lru")}


def test_namespace_rules_take_the_first_match_and_fill_gaps_from_the_defaults(write_toml: Callable[[str], str]) -> None:
    path = write_toml(
        """
        [namespaces."llama-3*tp0*"]
        dram_quota_bytes = 4096
        nvme_quota_bytes = "1TiB"
        [namespaces."llama*"]
        policy = "lru"
        ttl_s = 60
        """
    )
    config = load({"dram_quota_bytes": "1MiB", "ttl_s": "3600"}, config_file=path)
    assert config.rule_for("llama-3-8b tp0/2").dram_quota_bytes == 4096
    assert config.rule_for("llama-2").dram_quota_bytes == 1 << 20
    assert [config.rule_for(label).nvme_quota_bytes for label in ("llama-3 tp0", "llama-2")] == [1 << 40, 0]
    assert [config.rule_for(label).ttl_s for label in ("llama-3 tp0", "llama-2", "qwen")] == [3600.0, 60.0, 3600.0]
    assert config.rule_for("qwen") == NamespaceRule(dram_quota_bytes=1 << 20, ttl_s=3600.0, policy="lru")
    assert config.rule_for("LLAMA-2") == config.rule_for("qwen"), "labels are matched by case"


def test_a_small_arena_lowers_the_default_segment_but_not_a_chosen_one() -> None:
    config = load({"dram_bytes": "64MiB"})
    assert config.dram_segment_bytes == 8 << 20
    assert "lowered" in config.origin("dram_segment_bytes")
    with pytest.raises(ConfigError, match=r"dram_segment_bytes .*128MiB is more than dram_bytes \(64MiB\)"):
        load({"dram_bytes": "64MiB", "dram_segment_bytes": "128MiB"})


@pytest.mark.parametrize(
    ("flags", "environ", "says"),
    [
        ({"dram_byte": "1"}, {}, "did you mean dram_bytes"),
        ({}, {"KVSERVICE_DRAMBYTES": "1"}, "did you mean dram_bytes"),
        ({}, {"KVSERVICE_HTP_PORT": "1"}, "did you mean http_port"),
        ({}, {"KVSERVICE_ZZZ": "1"}, "KVSERVICE_ZZZ is not a knob; unset it"),
        ({}, {"KVSERVICE_NAMESPACES": "x"}, "belongs in the TOML file"),
        ({}, {"KVSERVICE_LEASE_S": "30s"}, r"lease_s \(from KVSERVICE_LEASE_S\): '30s' is not a number"),
        ({"dram_bytes": "4GB"}, {}, r"dram_bytes \(from --dram-bytes\): .*write 4GiB"),
    ],
)
def test_unknown_and_malformed_settings_say_where_they_are_and_what_to_write(
    flags: Mapping[str, str], environ: Mapping[str, str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load(flags, environ)


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("drain = 1", "drain is not a knob; did you mean drain_s"),
        ("drain_s = '20'", "expected a number|expected number, found text"),
        ("http_port = true", "expected integer, found a boolean"),
        ("dram_huge_pages = 1", "expected true or false, found an integer"),
        ("dram_bytes = 1.5", "expected bytes, found a number"),
        ("allowed_uids = ['root']", "expected list of integers, found an array"),
        ("allowed_uids = [true]", "expected list of integers"),
        ("tenants = 'a'", "expected table of text, found text"),
        ("[tenants]\n'uid:1' = 1", "expected table of text"),
        ("namespaces = 1", "expected tables"),
        ("[namespaces]\nllama = 1", "is not a table"),
        ("[namespaces.llama]\nquota = 1", "knows no quota"),
        ("[namespaces.llama]\ndram_quota_bytes = 'much'", "is not a size"),
        ("[namespaces.llama]\ndram_quota_bytes = -1", "out of bounds"),
        ("[namespaces.llama]\npolicy = 'lfu'", "not one of fifo, lru, lookahead, predictive"),
        ("drain_s = ", "is not TOML"),
        ("drain_s = 1\ndrain_s = 2", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path(write_toml: Callable[[str], str], toml: str, says: str) -> None:
    path = write_toml(toml)
    with pytest.raises(ConfigError, match=says) as refused:
        load(config_file=path)
    assert path in str(refused.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        load(config_file=str(tmp_path / "missing.toml"))
    with pytest.raises(ConfigError, match=r"cannot read .*directory"):
        load(config_file=str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(config_file=str(tmp_path / "binary"))
    (tmp_path / "long").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than 1MiB"):
        load(config_file=str(tmp_path / "long"))


KUBERNETES_SERVICE_LINKS = {
    "KVSERVICE_SERVICE_HOST": "10.0.0.7",
    "KVSERVICE_SERVICE_PORT": "9477",
    "KVSERVICE_SERVICE_PORT_METRICS": "9477",
    "KVSERVICE_PORT": "tcp://10.0.0.7:9477",
    "KVSERVICE_PORT_9477_TCP": "tcp://10.0.0.7:9477",
    "KVSERVICE_PORT_9477_TCP_PROTO": "tcp",
    "KVSERVICE_PORT_9477_TCP_PORT": "9477",
    "KVSERVICE_PORT_9477_TCP_ADDR": "10.0.0.7",
    "KVSERVICE_METRICS_SERVICE_HOST": "10.0.0.8",
    "KVSERVICE_METRICS_PORT": "tcp://10.0.0.8:80",
}


def test_variables_that_kubernetes_makes_for_a_service_are_not_ours() -> None:
    assert load(environ=KUBERNETES_SERVICE_LINKS) == load()
    with pytest.raises(ConfigError, match="enableServiceLinks"):
        load(environ={"KVSERVICE_HTTP_PORT": "tcp://10.0.0.7:80"})
