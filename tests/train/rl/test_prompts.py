"""Prompts from files and worlds, their order, and who gets which."""

import json

import pytest

from ospnext.config import ConfigError
from ospnext.shapes.scene import Scene
from ospnext.shapes.world import is_held_out
from ospnext.train.rl.prompts import groups_of_epoch, read_prompts, share_of


def test_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two \n")
    assert [p.text for p in read_prompts(str(tmp_path / "a.txt"), 0)] == ["one", "two"]
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "three", "count": 3}) + "\n")
    assert read_prompts(str(tmp_path / "b.jsonl"), 0) == [("three", {"count": 3})]
    (tmp_path / "c.jsonl").write_text('{"prompt": "four"}\n{"text": "five"}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_prompts(str(tmp_path / "c.jsonl"), 0)
    with pytest.raises(FileNotFoundError):
        read_prompts(str(tmp_path / "d.txt"), 0)


def test_scenes_of_a_world():
    seen, unseen = (read_prompts("shapes:large:12", 3, held_out) for held_out in (False, True))
    assert len(seen) == len(unseen) == 12
    assert not any(is_held_out(Scene.from_dict(p.metadata["scene"])) for p in seen)
    assert all(is_held_out(Scene.from_dict(p.metadata["scene"])) for p in unseen)
    assert read_prompts("shapes:large:12", 3, False) == seen
    json.dumps([p.metadata for p in seen])
    for name in ("shapes:tiny", "shapes:large:0"):
        with pytest.raises(ConfigError, match=f"{name}' is no world: write shapes:large"):
            read_prompts(name, 0)


@pytest.mark.parametrize("prompt", ["5", "null", '["a"]', '" "', "[" * 100_000], ids=lambda text: text[:6])
def test_a_prompt_in_json_is_a_text(tmp_path, prompt):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": {prompt}}}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 1: not"):
        read_prompts(str(tmp_path / "a.jsonl"), 0)


def test_every_prompt_comes_once_before_any_comes_again():
    seen = [p for epoch in range(10) for p in groups_of_epoch(epoch, 4, 10, seed=1)]
    for round_ in range(4):
        assert sorted(seen[10 * round_ : 10 * round_ + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert len(groups_of_epoch(3, 7, 2, seed=0)) == 7  # more groups than prompts


def test_whole_groups_go_round_the_ranks_where_they_can():
    assert share_of(0, 2, 4, 3) == [0, 1, 2, 6, 7, 8]
    assert share_of(1, 2, 4, 3) == [3, 4, 5, 9, 10, 11]
    # One group of four on two ranks, three groups of four on two: halves.
    assert share_of(0, 2, 1, 4) == [0, 1]
    assert share_of(1, 2, 3, 4) == [2, 3, 6, 7, 10, 11]
    for ranks, groups, size in ((1, 3, 4), (2, 3, 4), (4, 3, 4), (3, 2, 6), (8, 4, 4)):
        parts = [share_of(r, ranks, groups, size) for r in range(ranks)]
        assert sorted(s for part in parts for s in part) == list(range(groups * size))
        assert len({len(part) for part in parts}) == 1
