"""Runs the reference workload with mistral-batch and with transformers, and prints ratios, peak memory and agreement.

    python benches/vs_transformers.py WORKLOAD [--only classify|generate] [--texts N] [--rounds N] [--threads N]

WORKLOAD is the folder that benches/workload.py wrote. Each engine runs in processes of its own, turn by turn, so that a
machine's drift meets all of them. The clock of mistral-batch runs from the start of its process to its end, reading the
checkpoint and committing the output included; that of transformers from the first text to the last result, with the
model loaded before. Memory is the peak of the whole process. Transformers computes in the dtype that a line names;
mistral-batch computes in f32, whatever the checkpoint, unless a line says f16 (`--dtype f16`).
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

OURS = "mistral-batch"
# Name: (kind of transformers run or None for ours, checkpoint, dtype)
CLASSIFY = {
    f"{OURS}, f32 checkpoint": (None, "checkpoint", "float32"),
    f"{OURS}, bf16 checkpoint": (None, "checkpoint-bf16", "float32"),
    f"{OURS}, bf16 checkpoint, f16": (None, "checkpoint-bf16", "float16"),
    "transformers sorted loop, f32": ("loop", "checkpoint", "float32"),
    "transformers sorted loop, bf16": ("loop", "checkpoint-bf16", "bfloat16"),
    "transformers pipeline, batch 8, f32": ("pipeline-8", "checkpoint", "float32"),
    "transformers pipeline, batch 8, bf16": ("pipeline-8", "checkpoint-bf16", "bfloat16"),
    "transformers pipeline, batch 32, f32": ("pipeline-32", "checkpoint", "float32"),
    "transformers pipeline, batch 32, bf16": ("pipeline-32", "checkpoint-bf16", "bfloat16"),
}
GENERATE = {
    f"{OURS}, f32 checkpoint": (None, "lm-f32", "float32"),
    f"{OURS}, bf16 checkpoint": (None, "lm", "float32"),
    f"{OURS}, bf16 checkpoint, f16": (None, "lm", "float16"),
    "transformers generate, f32": ("generate", "lm-f32", "float32"),
    "transformers generate, bf16": ("generate", "lm", "bfloat16"),
}


def run(command: list[str]) -> tuple[bytes, float, float]:
    """Output, wall seconds and peak memory in MB of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"failed: {' '.join(command)}")
    return output, time.perf_counter() - started, usage.ru_maxrss / 1000


def ours(args, task: str, model: str, dtype: str) -> dict:
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        output, report = Path(folder) / "out.parquet", Path(folder) / "report.json"
        command = [args.binary, task, "-i", str(args.workload / "texts.parquet"), "--model", str(args.workload / model),
                   "-o", str(output), "--report", str(report), "-q", "--threads", str(args.threads),
                   "--dtype", dtype.replace("float", "f")]
        if task == "classify":
            command += ["--limit", str(args.texts)]
        else:
            command += ["--limit", str(args.prompts), "--max-tokens", str(args.tokens), "--ignore-eos",
                        "--max-length", "1024", "--overflow", "truncate-right"]
        _, seconds, megabytes = run(command)
        table, details = pq.read_table(output), json.loads(report.read_text())["details"]
    column = "predicted_label" if task == "classify" else "completion"
    return {"tokens": details["tokens"], "seconds": seconds, "megabytes": megabytes, "answers": table[column].to_pylist(),
            "profile": details["profile_percent"]}


def transformers(args, task: str, name: str) -> dict:
    output, _, megabytes = run([sys.executable, __file__, *sys.argv[1:], "--engine", task, name])
    return {**json.loads(output), "megabytes": megabytes}


def engine(args, task: str, name: str) -> dict:
    """One run of transformers, in this process."""
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoTokenizer, MistralForCausalLM, MistralForSequenceClassification, pipeline

    torch.set_num_threads(args.threads)
    kind, folder, dtype = (CLASSIFY if task == "classify" else GENERATE)[name]
    path, dtype = args.workload / folder, getattr(torch, dtype)
    tok = AutoTokenizer.from_pretrained(path)
    texts = pq.read_table(args.workload / "texts.parquet")["text"].to_pylist()
    if kind == "generate":
        texts = texts[:args.prompts]
        model = MistralForCausalLM.from_pretrained(path, dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        with torch.inference_mode():
            model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=1, do_sample=False, pad_token_id=2)
            started = time.perf_counter()
            inputs = tok(texts, padding=True, truncation=True, max_length=1024, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, pad_token_id=2)
            answers = tok.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        return {"seconds": time.perf_counter() - started, "answers": answers}

    texts = texts[:args.texts]
    model = MistralForSequenceClassification.from_pretrained(path, dtype=dtype).eval()
    limit = model.config.max_position_embeddings
    answers = [None] * len(texts)
    if kind.startswith("pipeline"):
        classify = pipeline("text-classification", model=model, tokenizer=tok, device="cpu",
                            batch_size=int(kind.removeprefix("pipeline-")))
        classify(texts[:1])
        started = time.perf_counter()
        answers = [result["label"] for result in classify(texts, truncation=True, max_length=limit)]
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
                for i, row in zip(batch, model(input_ids=ids, attention_mask=mask).logits):
                    answers[i] = model.config.id2label[row.argmax().item()]
                at += len(batch)
    return {"seconds": time.perf_counter() - started, "answers": answers}


def compare(args, task: str, engines: dict) -> None:
    runs = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, (kind, folder, dtype) in engines.items():
            runs[name].append(transformers(args, task, name) if kind else ours(args, task, folder, dtype))
    seconds = {name: statistics.median(run["seconds"] for run in runs[name]) for name in engines}
    first, second, third = list(engines)[:3]  # ours: from the f32 and the bf16 checkpoint, and in f16
    if task == "classify":
        work, unit = runs[first][0]["tokens"], "tokens/s"
        print(f"classify: {args.texts} texts, {work} tokens, {args.rounds} round(s), {args.threads} thread(s)")
    else:
        work, unit = args.prompts * args.tokens, "new tokens/s"
        print(f"generate: {args.prompts} prompts, {args.tokens} new tokens each, {args.rounds} round(s), {args.threads} thread(s)")
    print(f"{'':38} {unit:>13} {'f32 ratio':>10} {'bf16 ratio':>10} {'f16 ratio':>10} {'peak MB':>8}  same answers as ours from that checkpoint")
    for name, (_, folder, _) in engines.items():
        own = first if folder == engines[first][1] else second
        same = sum(a == b for a, b in zip(runs[own][0]["answers"], runs[name][0]["answers"]))
        memory = max(run["megabytes"] for run in runs[name])
        print(f"{name:38} {work / seconds[name]:13.0f} {seconds[name] / seconds[first]:10.2f} "
              f"{seconds[name] / seconds[second]:10.2f} {seconds[name] / seconds[third]:10.2f} {memory:8.0f}  "
              f"{same}/{len(runs[own][0]['answers'])}")
    for name in (first, second, third):
        parts = sorted(runs[name][0]["profile"].items(), key=lambda part: -part[1])
        print(f"  time of {name}: " + ", ".join(f"{part} {percent:.1f}%" for part, percent in parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--only", choices=("classify", "generate"))
    parser.add_argument("--binary", default="target/release/mistral-batch")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lines", default="", help="only transformers' lines whose name contains this, or one of several parted by |")
    parser.add_argument("--engine", nargs=2, help=argparse.SUPPRESS)  # one run of transformers in its own process
    args = parser.parse_args()
    if args.engine:
        json.dump(engine(args, *args.engine), sys.stdout)
        return
    for task, engines in (("classify", CLASSIFY), ("generate", GENERATE)):
        if args.only in (None, task):
            compare(args, task, {name: run for name, run in engines.items() if run[0] is None or any(part in name for part in args.lines.split("|"))})


if __name__ == "__main__":
    main()
