"""PDF by Typst: one compiler per process, fonts that travel with the program, the same bytes for the same data."""

from __future__ import annotations

import datetime as dt
import json
import threading
from functools import cache
from pathlib import Path
from typing import Any

import typst

FOLDER = Path(__file__).parent
TEMPLATES = FOLDER / "templates"
FONTS = FOLDER / "fonts"
# PDF/A-2b: an archive can show it in decades, and its viewer needs no font of its own.
STANDARD = "a-2b"

_lock = threading.Lock()


@cache
def get_fonts() -> typst.Fonts:
    """Return the fonts beside this file and no others, so that every machine gives the same document."""
    return typst.Fonts(include_system_fonts=False, include_embedded_fonts=False, font_paths=[FONTS])


@cache
def _get_compiler(template: str) -> typst.Compiler:
    return typst.Compiler(TEMPLATES / template, root=TEMPLATES, font_paths=get_fonts(), ignore_system_fonts=True)


def render_template(template: str, view: dict[str, Any], *, dated: dt.date) -> bytes:
    """Return the PDF of a template; `view` is what it reads, in words and formatted numbers.

    `dated` is the day of creation that the file states: no clock is read.
    """
    created_at = dt.datetime.combine(dated, dt.time(), dt.UTC)
    with _lock:  # a compiler serves one document at a time
        data = _get_compiler(template).compile(
            format="pdf",
            sys_inputs={"view": json.dumps(view, ensure_ascii=False)},
            timestamp=created_at,
            pdf_standards=STANDARD,
        )
    assert isinstance(data, bytes)
    return data
