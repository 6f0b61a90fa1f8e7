"""config: every knob once, with unit, default and consequence.

`knobs` lists them and checks what they mean together, `fields` describes one, `choices` has the words of those that are
words, `values` reads and writes one value, `sources` decides which source wins, `document` prints them.
"""

from kvservice.config.choices import ADMISSIONS, POLICIES
from kvservice.config.document import as_markdown
from kvservice.config.fields import Knob, nearest_name
from kvservice.config.knobs import KNOBS, Config
from kvservice.config.sources import CONFIG_VARIABLE
from kvservice.config.values import Kind, NamespaceRule, format_size, parse_size
from kvservice.errors import ConfigError

__all__ = [
    "ADMISSIONS",
    "CONFIG_VARIABLE",
    "KNOBS",
    "POLICIES",
    "Config",
    "ConfigError",
    "Kind",
    "Knob",
    "NamespaceRule",
    "as_markdown",
    "format_size",
    "nearest_name",
    "parse_size",
]
