"""The cleaning of captions, rule by rule, and the choice among them."""

import numpy as np
import pytest

from ospnext.data.captions import choose, clean


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red BALL rolls.", "a red ball rolls."),
        ("a cat https://example.com/a?b=1 sleeps", "a cat sleeps"),
        ("a cat from www.cats.org/tom sleeps", "a cat from sleeps"),
        ("visit shop.com/now today", "visit today"),
        ("a <b>bold</b> <i>dog</i> runs<br/>", "a bold dog runs"),
        ("<person> walks", "person walks"),
        ("a dog &lt; a cat", "a dog < a cat"),
        ("a dog &amp; a cat", "a dog a cat"),
        ("by @painter42 a tree", "by a tree"),
        ("a tree 一只猫 in wind", "a tree in wind"),
        ("a ship #123 and #1234567 sail", "a ship and sail"),
        ("IMG_0001.jpg a lake", "a lake"),
        ("at 192.168.0.1 a lake", "at a lake"),
        ("a lake 12345678 at dawn", "a lake at dawn"),
        ("a lake jc6640vc at dawn", "a lake at dawn"),
        ("a lake 1280x720 at dawn", "a lake at dawn"),
        ("“a lake” — ‘at dawn’", "a lake\" - 'at dawn"),
        ("free shipping a chair", "a chair"),
        ("a-chair-made-of-old-wood", "a chair made of old wood"),
        ("a well-made chair", "a well-made chair"),
        ("a chair [best] (new)", "a chair best new"),
        ("wait... what", "wait what"),
        ("  spaces \n and\ttabs ", "spaces and tabs"),
        ("a%20lake+at+dawn", "a lake at dawn"),
        ("3 < 5 and 7 > 2", "3 < 5 and 7 > 2"),
        ("", ""),
    ],
)
def test_rules(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_chinese_is_kept_on_request() -> None:
    assert clean("一只猫 sleeps", keep_chinese=True) == "一只猫 sleeps"
    assert clean("一只猫在睡觉") == ""
    assert clean("一只猫在睡觉", keep_chinese=True) == "一只猫在睡觉"


def test_long_and_odd_texts_end() -> None:
    for text in ("<" * 5000, "a-" * 5000, "." * 5000, "#1" * 5000, "a.com/" * 2000, "0:" * 5000, '"' * 5000):
        clean(text)


def test_choice_and_drop() -> None:
    rng = np.random.default_rng(0)
    draws = [choose(("a", "b", "c"), rng, 0.1) for _ in range(5000)]
    assert abs(draws.count(None) / 5000 - 0.1) < 0.02
    assert min(draws.count(which) for which in range(3)) > 1350
    assert {choose(("a",), rng, 1.0) for _ in range(50)} == {None}
    assert {choose(("a",), rng, 0.0) for _ in range(50)} == {0}
    assert choose((), rng, 0.0) is None
