"""Completes 16 prompts greedily with mistral-batch and with transformers' generate, and prints the ratio of new tokens per second.

    python benches/generate_vs_transformers.py --model DIR --input FILE.parquet [--prompts N] [--tokens N]

Each engine runs in a process of its own; its clock runs from the first prompt to the last completion, with the model
loaded before. Both compute in f32; the end token is ignored, so that both generate the same number of tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def mistral_batch(args, folder: Path) -> dict:
    import pyarrow.parquet as pq

    output, report = folder / "out.parquet", folder / "report.json"
    subprocess.run([args.binary, "generate", "-i", args.input, "--model", args.model, "-o", str(output), "--overwrite",
                    "--limit", str(args.prompts), "--max-tokens", str(args.tokens), "--ignore-eos", "--max-length", "1024",
                    "--overflow", "truncate-right", "--report", str(report), "-q"], check=True)
    seconds = json.loads(report.read_text())["details"]["timings"]["pipeline_seconds"]
    return {"seconds": seconds, "texts": pq.read_table(output)["completion"].to_pylist()}


def transformers(args) -> dict:
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoTokenizer, MistralForCausalLM

    texts = pq.read_table(args.input)["text"].to_pylist()[:args.prompts]
    model = MistralForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tok = AutoTokenizer.from_pretrained(args.model)
    with torch.inference_mode():
        model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=1, do_sample=False, pad_token_id=2)
        started = time.perf_counter()
        inputs = tok(texts, padding=True, truncation=True, max_length=1024, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, pad_token_id=2)
        completions = tok.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "texts": completions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--binary", default="target/release/mistral-batch")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)  # one run in its own process
    args = parser.parse_args()
    if args.reference:
        json.dump(transformers(args), sys.stdout)
        return
    with tempfile.TemporaryDirectory() as folder:
        ours = mistral_batch(args, Path(folder))
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--reference"], check=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL)
    theirs = json.loads(done.stdout)
    new_tokens = args.prompts * args.tokens
    same = sum(a == b for a, b in zip(ours["texts"], theirs["texts"]))
    print(f"mistral-batch {new_tokens / ours['seconds']:.0f} new tokens/s, transformers {new_tokens / theirs['seconds']:.0f}, "
          f"ratio {theirs['seconds'] / ours['seconds']:.1f}; {same} of {args.prompts} completions equal")


if __name__ == "__main__":
    main()
