"""Classifies 1,000 to 1,000,000 short rows with a tiny model, and prints rows a second and peak memory.

    python benches/scale.py [--binary FILE] [--rows N ...]

What is left of the program when the model costs nothing: reading, tokenizing, packing, writing.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MODEL = Path(__file__).parent.parent / "tests/goldens/checkpoints/cls-nopad"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/mistral-batch")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            source, report = Path(folder) / "in.parquet", Path(folder) / "report.json"
            pq.write_table(pa.table({"text": [f"order {i * 7919 % rows} came {i % 13} days late" for i in range(rows)]}), source)
            command = [args.binary, "classify", "-i", str(source), "--model", str(MODEL), "-o", str(Path(folder) / "out.parquet"),
                       "--overwrite", "--report", str(report), "-q"]
            process = subprocess.Popen(command)
            _, status, usage = os.wait4(process.pid, 0)
            if status != 0:
                raise SystemExit(f"failed: {' '.join(command)}")
            details = json.loads(report.read_text())["details"]
            print(f"{rows:>9} rows: {rows / details['pipeline_seconds']:8.0f} rows/s, {usage.ru_maxrss / 1000:.0f} MB, "
                  f"tokenizing {details['profile_percent']['tokenizing']:.1f}% of the time", flush=True)


if __name__ == "__main__":
    main()
