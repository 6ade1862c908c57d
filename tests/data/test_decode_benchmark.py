"""The decoding benchmark runs at tiny sizes and prints what it promises, with whichever peers there are."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decode.py"


def test_a_line_for_each_file_and_one_for_all(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--reads", "1", "--frames", "9", "--files", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [set(row) >= {"ms", "cpu_ms", "speed", "cpu_speed"} for row in rows] == [True, True, False]
    assert all(difference < 3 for row in rows[:2] for difference in row["differs_from_ours"].values())
    assert rows[2]["total_ms"]["ours"] > 0
    assert len(list(tmp_path.glob("*.mp4"))) == 2
