"""Make the two font files beside this script from Noto Sans CJK, whose license (OFL.txt) allows it.

    pip install fonttools
    python build_subset.py /usr/share/fonts/opentype/noto      # Debian package fonts-noto-cjk

The regular weight has ASCII, Latin-1, Latin Extended-A, punctuation, currency signs and all of GB 2312 (6,763 Chinese
characters). The bold weight is for headings: of Chinese it has only what the templates say, as two full weights would
be 5 MB. Chinese names in bold are the regular weight with an outline (`bold-name` in templates/house.typ).
"""

from __future__ import annotations

import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTCollection

FAMILY = "Noto Sans CJK SC"
SYMBOLS = "–—―‘’‚“”„†‡•…‰′″‹›⁄€₤₩₫₹₽№™←↑→↓∑−∞≈≠≤≥■□▲△◆◇○●★☆✓"
FEATURES = ["kern", "tnum", "pnum", "ccmp", "locl", "mark", "mkmk"]


def list_gb2312() -> set[int]:
    """Return the code points of GB 2312."""
    code_points = set()
    for row in range(0xA1, 0xF8):
        for cell in range(0xA1, 0xFF):
            try:
                code_points.add(ord(bytes([row, cell]).decode("gb2312")))
            except UnicodeDecodeError:
                continue
    return code_points


def list_template_characters() -> set[int]:
    """Return the code points in the templates."""
    folder = Path(__file__).parent.parent / "templates"
    return {ord(character) for file in folder.glob("*.typ") for character in file.read_text() if character >= " "}


def build(source: Path, target: Path, *, chinese: set[int]) -> None:
    """Write the subset of one weight."""
    collection = TTCollection(source)
    font = next(font for font in collection.fonts if font["name"].getDebugName(1).startswith(FAMILY))
    options = subset.Options(
        hinting=False, layout_features=FEATURES, name_IDs=[0, 1, 2, 3, 4, 5, 6, 13, 14], notdef_outline=True
    )
    options.drop_tables += ["vhea", "vmtx", "VORG", "BASE", "DSIG"]
    subsetter = subset.Subsetter(options)
    code_points = {*range(0x20, 0x7F), *range(0xA0, 0x180), *map(ord, SYMBOLS), *range(0x3000, 0x3018)}
    code_points |= set(range(0xFF01, 0xFF5F)) | {0xFFE5} | chinese
    subsetter.populate(unicodes=code_points)
    subsetter.subset(font)
    # Nothing of the day or the machine goes into the file: the same source gives the same bytes.
    font["head"].modified = font["head"].created
    font.recalcTimestamp = False
    font.save(target)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    here = Path(__file__).parent
    labels = list_template_characters()
    regular = here / "NotoSansCJKsc-Regular-subset.otf"
    build(folder / "NotoSansCJK-Regular.ttc", regular, chinese=list_gb2312() | labels)
    build(folder / "NotoSansCJK-Bold.ttc", here / "NotoSansCJKsc-Bold-subset.otf", chinese=labels)
