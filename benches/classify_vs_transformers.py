"""Classifies one dataset with mistral-batch and with transformers, and prints the ratio of tokens per second.

    python benches/classify_vs_transformers.py --model DIR --input FILE.parquet [--texts N] [--rounds N]

Each engine runs in processes of its own, turn by turn, so that a machine's drift meets all of them. The clock of each
runs from the first text to the last result, with the model loaded before. The results are compared, too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENGINES = ("mistral-batch", "transformers pipeline, batch 8", "transformers sorted loop")


def mistral_batch(args, folder: Path) -> dict:
    import pyarrow.parquet as pq

    output, report = folder / "out.parquet", folder / "report.json"
    command = [args.binary, "classify", "-i", args.input, "--model", args.model, "-o", str(output), "--overwrite",
               "--text-column", args.text_column, "--report", str(report), "--limit", str(args.texts), "-q"]
    if args.threads:
        command += ["--threads", str(args.threads)]
    subprocess.run(command, check=True)
    details = json.loads(report.read_text())["details"]
    table = pq.read_table(output)
    return {"tokens": details["tokens"], "seconds": details["timings"]["pipeline_seconds"],
            "labels": table["predicted_label"].to_pylist(), "scores": table["predicted_score"].to_pylist()}


def transformers(args, kind: str) -> dict:
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoTokenizer, MistralForSequenceClassification, pipeline

    if args.threads:
        torch.set_num_threads(args.threads)
    texts = pq.read_table(args.input, columns=[args.text_column])[args.text_column].to_pylist()[:args.texts]
    model = MistralForSequenceClassification.from_pretrained(args.model, dtype=torch.float32).eval()
    tok = AutoTokenizer.from_pretrained(args.model)
    limit = model.config.max_position_embeddings
    tokens = sum(len(ids) for ids in tok(texts, truncation=True, max_length=limit)["input_ids"])
    labels, scores = [None] * len(texts), [None] * len(texts)
    if kind == "pipeline":
        run = pipeline("text-classification", model=model, tokenizer=tok, device="cpu", batch_size=8)
        run(texts[:1])
        started = time.perf_counter()
        results = run(texts, truncation=True, max_length=limit)
        seconds = time.perf_counter() - started
        labels, scores = [r["label"] for r in results], [r["score"] for r in results]
    else:  # what a careful user writes by hand: sorted by length, at most 4,096 padded tokens a batch
        with torch.inference_mode():
            model(input_ids=torch.tensor([[1, 5, 6]]))
            started = time.perf_counter()
            rows = tok(texts, truncation=True, max_length=limit)["input_ids"]
            order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
            at = 0
            while at < len(order):
                width = len(rows[order[at]])
                batch = order[at:at + max(1, 4096 // width)]
                ids = torch.tensor([[2] * (width - len(rows[i])) + rows[i] for i in batch])
                mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in batch])
                for i, row in zip(batch, model(input_ids=ids, attention_mask=mask).logits.softmax(-1)):
                    labels[i], scores[i] = model.config.id2label[row.argmax().item()], row.max().item()
                at += len(batch)
            seconds = time.perf_counter() - started
    return {"tokens": tokens, "seconds": seconds, "labels": labels, "scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--binary", default="target/release/mistral-batch")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--engine", choices=("pipeline", "loop"), help=argparse.SUPPRESS)  # one run in its own process
    args = parser.parse_args()
    if args.engine:
        json.dump(transformers(args, args.engine), sys.stdout)
        return

    runs = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            runs[ENGINES[0]].append(mistral_batch(args, Path(folder)))
            for engine, kind in zip(ENGINES[1:], ("pipeline", "loop")):
                done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--engine", kind], check=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                runs[engine].append(json.loads(done.stdout))
    ours = runs[ENGINES[0]][0]
    rates = {engine: statistics.median(run["tokens"] / run["seconds"] for run in runs[engine]) for engine in ENGINES}
    print(f"{len(ours['labels'])} texts, {ours['tokens']} tokens, {args.rounds} round(s), "
          f"{args.threads or os.cpu_count()} thread(s)")
    for engine in ENGINES:
        theirs = runs[engine][0]
        same = sum(a == b for a, b in zip(ours["labels"], theirs["labels"]))
        far = max(abs(a - b) for a, b in zip(ours["scores"], theirs["scores"]))
        print(f"{engine:32} {rates[engine]:8.0f} tokens/s   ratio {rates[ENGINES[0]] / rates[engine]:5.2f}   "
              f"labels equal {same}/{len(ours['labels'])}, largest score difference {far:.1e}")


if __name__ == "__main__":
    main()
