"""Write docs/configuration.md from the knobs. A test compares the two."""

from __future__ import annotations

from pathlib import Path

from kvservice.config import KNOBS, as_markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def page() -> str:
    """The page as it should be."""
    return as_markdown(KNOBS)


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
