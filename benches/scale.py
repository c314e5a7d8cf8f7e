"""Classifies 1,000 to 3,000,000 short rows with a tiny model, and prints rows a second and peak memory.

    python benches/scale.py [--binary FILE] [--rows N ...] [--format parquet|csv|jsonl] [--memory-limit SIZE]

What is left of the program when the model costs nothing: reading, tokenizing, packing, writing. It fails when the peak grows by
more than 15% from 100,000 rows on: memory is bounded by settings, not by data.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import tempfile
from pathlib import Path

MODEL = Path(__file__).parent.parent / "tests/goldens/checkpoints/cls-nopad"
STEADY_ROWS = 100_000
ALLOWED_GROWTH = 1.15


def texts(rows: int):
    return (f"order {i * 7919 % rows} came {i % 13} days late" for i in range(rows))


def write(path: Path, rows: int) -> None:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.table({"text": list(texts(rows))}), path)
        return
    with open(path, "w") as file:
        if path.suffix == ".csv":
            file.write("text\n")
            file.writelines(f"{text}\n" for text in texts(rows))
        else:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/mistral-batch")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 3_000_000])
    parser.add_argument("--format", choices=["parquet", "csv", "jsonl"], default="parquet")
    parser.add_argument("--memory-limit")
    args = parser.parse_args()
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            source, report = Path(folder) / f"in.{args.format}", Path(folder) / "report.json"
            # In a process of its own: a child's peak begins with what its parent holds.
            writer = multiprocessing.Process(target=write, args=(source, rows))
            writer.start()
            writer.join()
            command = [args.binary, "classify", "-i", str(source), "--model", str(MODEL), "-o", f"{folder}/out.{args.format}",
                       "--overwrite", "--report", str(report), "-q"]
            if args.memory_limit:
                command += ["--memory-limit", args.memory_limit]
            process = subprocess.Popen(command)
            _, status, usage = os.wait4(process.pid, 0)
            if status != 0:
                raise SystemExit(f"failed: {' '.join(command)}")
            details = json.loads(report.read_text())["details"]
            peaks[rows] = usage.ru_maxrss / 1000
            print(f"{rows:>9} rows: {rows / details['timings']['pipeline_seconds']:8.0f} rows/s, {peaks[rows]:.0f} MB at the peak, "
                  f"tokenizing {details['profile_percent']['tokenizing']:.1f}% of the time", flush=True)
    steady = [peak for rows, peak in peaks.items() if rows >= STEADY_ROWS]
    if steady and max(steady) > ALLOWED_GROWTH * min(steady):
        raise SystemExit(f"memory grows with the data: {min(steady):.0f} to {max(steady):.0f} MB")


if __name__ == "__main__":
    main()
