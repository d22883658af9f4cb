"""Peak memory of `standardize` and `select` from 10,000 to 200,000 records, a process of its own for each size.

    r4b bench data curate_memory

Records are tiny (a question of 20 words, no picture), so that what grows with their number shows: the signatures that
repetitions are looked for in, and the choice. The ``ours`` of a row is seconds, the memory is in ``extra_info``.

Peak MiB, 2026-11-20, AMD EPYC, 2 cores shared with other jobs, Python 3.11, pyarrow 26.0.1, commit 14288ed, one run:

=========  ============  =============  =========
records    before        standardize    select
=========  ============  =============  =========
10,000     82            149            149
50,000     81            162            166
200,000    81            165            165
=========  ============  =============  =========
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, random, resource, sys
from pathlib import Path
from r4b_core.curate.runner import run_stage
from r4b_core.curate.select import SelectSettings, select
from r4b_core.curate.standardize.run import standardize
from r4b_core.curate.standardize.settings import InputSettings, StandardizeSettings

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

folder, count = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(0)
words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(5000)]
with (folder / "rows.jsonl").open("w") as file:
    for i in range(count):
        row = {"id": i, "question": " ".join(draw.choices(words, k=20)) + "?", "answer": str(i), "source": "tiny"}
        print(json.dumps(row), file=file)
before = peak()
settings = StandardizeSettings()
run = lambda store, work, told: run_stage(store, work, 0, told)
counts = standardize(folder / "1", [InputSettings(path=str(folder / "rows.jsonl"))], settings, run)
assert counts.num_kept == count, counts
after = peak()
select(folder / "2", folder / "1", SelectSettings(quotas={"tiny": count // 2}), 0, run)
print(json.dumps({"before": before, "standardize": after, "select": peak()}))
"""


@pytest.mark.parametrize("count", [10_000, 50_000, 200_000])
def test_memory(count: int, tmp_path: Path, benchmark: Any) -> None:
    paths = f"{ROOT / 'kernels'}:{ROOT}"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(count)],
        env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    seconds = time.perf_counter() - start
    peaks = json.loads(done.stdout)
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(ours=seconds, peak_mib=peaks, records=count)
    shown = ", ".join(f"{name} {size:.0f}" for name, size in peaks.items())
    print(f"\n{count}: peak MiB {shown}; {count / seconds:.0f} records/s")
