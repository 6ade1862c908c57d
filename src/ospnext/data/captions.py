"""What becomes of a caption in training: one is chosen, cleaned, and sometimes left out.

``clean`` removes what says nothing about the picture: addresses, mark-up, names of files, codes. The rules are those
of DeepFloyd IF's caption cleaning, which OSP-Next's weights were trained with; it is applied twice, so that what one
pass uncovers the next one takes. It lowers case and drops Chinese, Japanese and Korean ideographs unless they are kept.
"""

import html
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from urllib.parse import unquote_plus

import ftfy
import numpy as np

_IDEOGRAPHS = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015"
    "\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_BAD_PUNCTUATION = re.compile(r"[" + "#®•©™&@·º½¾¿¡§~" + r"\)\(\]\[\}\{\|\\/*" + r"]{1,}")

_BEFORE_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"<person>"), "person"),  # what some data sets write for a name
    (re.compile(r"\b(?:https?|ftp)://\S+"), ""),
    (re.compile(r"\bwww\.[\w-]+\.\S+"), ""),
    (re.compile(r"\b[\w.-]+\.(?:com|co|ru|net|org|edu|gov|it)\b(?:/\S*)?"), ""),
)
_AFTER_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"@[\w\d]+\b"), ""),
    (re.compile(f"[{_IDEOGRAPHS}]+"), ""),
    (re.compile(f"[{_DASHES}]+"), "-"),
    (re.compile("[`´«»“”¨]"), '"'),
    (re.compile("[‘’]"), "'"),
    (re.compile(r"&quot;?|&amp"), ""),
    (re.compile(r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b"), " "),  # addresses of machines
    (re.compile(r"\b\d+:\d\d\s*$"), ""),  # the number of an article
    (re.compile(r"\\n"), " "),
    (re.compile(r"#\d{1,3}\b"), ""),
    (re.compile(r"#\d{5,}\b"), ""),
    (re.compile(r"\b\d{6,}\b"), ""),
    (re.compile(r"\S+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)\b"), ""),
    (re.compile(r"[\"']{2,}"), '"'),
    (re.compile(r"\.{2,}"), " "),
    (_BAD_PUNCTUATION, " "),
    (re.compile(r"\s+\.\s+"), " "),
)
_HYPHEN = re.compile(r"[-_]")
_CODES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b[a-z]{0,3}\d{5,}[a-z]{0,3}\b"), ""),  # abc12345, 12345abc
    (re.compile(r"\b[a-z]+\d+[a-z]+\d*\b|\b\d+[a-z]+\d+\b"), ""),  # a1b, 12ab3
    (re.compile(r"(?:worldwide\s+)?(?:free\s+)?shipping"), ""),
    (re.compile(r"(?:free\s)?download(?:\sfree)?"), ""),
    (re.compile(r"\bclick\b\s(?:for|on)\s\w+"), ""),
    (re.compile(r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(?:\simages?)?\b"), ""),
    (re.compile(r"\bpage\s+\d+\b"), ""),
    (re.compile(r"\b\d+[xх×]\d+\b"), ""),  # 1280x720; the second sign is Cyrillic
    (re.compile(r"\b\s+:\s+"), ": "),
    (re.compile(r"(\D[,./])\b"), r"\1 "),
    (re.compile(r"\s+"), " "),
    (re.compile(r"^[\"'](.*)[\"']$", re.DOTALL), r"\1"),
    (re.compile(r"^[\s'_,\-:;]+"), ""),
    (re.compile(r"[\s'_,\-:+]+$"), ""),
    (re.compile(r"^\.\S+$"), ""),
)


def clean(text: str, keep_chinese: bool = False) -> str:
    """``text`` cleaned twice by the rules above.

    Args:
        text: a caption.
        keep_chinese: leave Chinese, Japanese and Korean ideographs where they are.
    """
    return _clean_once(_clean_once(text, keep_chinese), keep_chinese)


def _clean_once(text: str, keep_chinese: bool) -> str:
    text = unquote_plus(text).strip().lower()
    for pattern, replacement in _BEFORE_MARKUP:
        text = pattern.sub(replacement, text)
    text = _text_of(text)
    for pattern, replacement in _AFTER_MARKUP:
        if not (keep_chinese and _IDEOGRAPHS in pattern.pattern):
            text = pattern.sub(replacement, text)
    if len(_HYPHEN.findall(text)) > 3:  # a-name-made-of-words, as in addresses
        text = _HYPHEN.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    for pattern, replacement in _CODES:
        text = pattern.sub(replacement, text)
    return text.strip()


def _text_of(text: str) -> str:
    """What a browser would show of mark-up."""
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


class _Text(HTMLParser):
    """Collects text between tags, without that of scripts and styles."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter a tag."""
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        """Leave a tag."""
        self._hidden -= tag in ("script", "style") and self._hidden > 0

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        if not self._hidden:
            self.parts.append(data)


def choose(captions: Sequence[str], rng: np.random.Generator, drop: float) -> int | None:
    """Which of the captions to use; None, with probability ``drop``, for the empty one, that guidance learns from.

    Two numbers are drawn from ``rng`` whatever comes of it.
    """
    which, kept = rng.integers(max(1, len(captions))), rng.random() >= drop
    return int(which) if kept and captions else None
