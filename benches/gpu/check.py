"""Holds a CUDA build's results against transformers' goldens, in every precision.

    python benches/gpu/check.py BINARY [--device cuda:0] [--dtypes f32,f16,bf16]

Prints one line a check with the largest difference found, and exits with 1 if any is beyond its tolerance. Needs nothing but
Python: inputs and outputs are JSON lines. Every set runs twice, which has to give the same bytes, and once with rows apart,
which has to give the same numbers up to the order of sums.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

GOLDENS = Path(__file__).resolve().parent.parent.parent / "tests" / "goldens"
# Absolute, against f64. In half precision about what transformers 5.23 itself is away when it computes in that dtype (sdpa, on a
# CPU): logits at most 9.7e-3 in f16 and 6.7e-2 in bf16, log-probabilities 3.1e-2 and 2.0e-1 (of values down to -16).
TOLERANCES = {"f32": 1e-3, "f16": 1.5e-2, "bf16": 1e-1}
LOGPROBS = {"f32": 1e-3, "f16": 4e-2, "bf16": 2.5e-1}
# Between a row alone and in company: products of other widths may sum in other orders.
COMPANY = {"f32": 1e-4, "f16": 1.5e-2, "bf16": 1e-1}
CLASSIFIERS = ["cls-window-sharded", "cls-multilabel-bf16", "cls-nopad", "cls-pad-is-eos", "cls-regression-f16"]
LANGUAGE_MODELS = ["lm-window", "lm-full-tied-bf16"]

failures = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtypes", default="f32,f16,bf16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for dtype in args.dtypes.split(","):
            check = Check(args.binary, args.device, dtype, Path(folder))
            for name in CLASSIFIERS:
                check.classifier(name)
            check.embedder("embedder")
            check.tagger("tagger-bio")
            for name in LANGUAGE_MODELS:
                check.score(name)
                check.generate(name)
    print("all within tolerance" if failures == 0 else f"{failures} checks failed")
    sys.exit(min(failures, 1))


class Check:
    def __init__(self, binary: str, device: str, dtype: str, folder: Path):
        self.binary, self.device, self.dtype, self.folder = binary, device, dtype, folder
        self.runs = 0

    def run(self, command: str, model: str, rows: list[dict], *flags: str) -> list[dict]:
        """The rows with their result columns; each run is one process, and has to be repeatable to the byte."""
        source = self.folder / "in.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        outputs = []
        for _ in range(2):
            self.runs += 1
            output = self.folder / f"{self.dtype}-{self.runs}.jsonl"
            arguments = [self.binary, command, "-i", source, "-o", output, "--model", GOLDENS / "checkpoints" / model,
                         "--device", self.device, "--dtype", self.dtype, "-q", *flags]
            done = subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"{' '.join(map(str, arguments))} exited with {done.returncode}:\n{done.stderr}")
            outputs.append(output.read_text())
        if outputs[0] != outputs[1]:
            tell(f"{self.dtype} {command} {model}: two runs", 1.0, 0.0)
        results = [json.loads(line) for line in outputs[0].splitlines()]
        assert len(results) == len(rows)
        failed = [row["error"] for row in results if row.get("error")]
        if failed:
            sys.exit(f"{command} {model}: a row failed: {failed[0]}")
        return results

    def compare(self, what: str, pairs, tolerance=None) -> None:
        difference = max((abs(ours - theirs) for ours, theirs in pairs), default=0.0)
        tell(f"{self.dtype} {what}", difference, TOLERANCES[self.dtype] if tolerance is None else tolerance)

    def classifier(self, name: str) -> None:
        golden = read(name)
        texts = [{"text": row["text"]} for row in golden["rows"]]
        regression = "regression" in name
        flags = [] if regression else ["--top-k", "all", "--function-to-apply", "none"]

        def logits(batch_tokens: str) -> list[list[float]]:
            rows = self.run("classify", name, texts, "--max-batch-tokens", batch_tokens, *flags)
            if regression:
                return [[row["predicted_value"]] for row in rows]
            config = json.loads((GOLDENS / "checkpoints" / name / "config.json").read_text())
            order = sorted(config["label2id"], key=config["label2id"].get)
            scores = [{entry["label"]: entry["score"] for entry in row["predicted_scores"]} for row in rows]
            return [[row[label] for label in order] for row in scores]

        together, apart = logits("4096"), logits("1")
        self.compare(f"classify {name}", flat(together, [row["logits_f64"] for row in golden["rows"]]))
        self.compare(f"classify {name}: alone = in company", flat(together, apart), COMPANY[self.dtype])

    def embedder(self, name: str) -> None:
        golden = read(name)
        texts = [{"text": row["text"]} for row in golden["rows"]]
        for pooling in ["last", "mean"]:
            rows = self.run("embed", name, texts, "--pooling", pooling)
            theirs = [row[f"{pooling}_pooled_f64"] for row in golden["rows"]]
            # Hidden states have values of up to 8 or so: half precision is relative.
            pairs = [(a / max(1, abs(b)), b / max(1, abs(b))) for a, b in flat([row["embedding"] for row in rows], theirs)]
            self.compare(f"embed {name} {pooling}", pairs)

    def tagger(self, name: str) -> None:
        golden = [row for row in read(name)["rows"] if row["pipeline_entities"].get("none") is not None]
        rows = self.run("tag", name, [{"text": row["text"]} for row in golden], "--aggregation", "none")
        pairs, moved = [], 0
        for row, theirs in zip(rows, golden):
            # With the word: the bytes of a character that the vocabulary lacks all have its place.
            theirs = {(entity["start"], entity["end"], entity["word"]): entity for entity in theirs["pipeline_entities"]["none"]}
            for entity in row["entities"]:
                found = theirs.get((entity["start"], entity["end"], entity["word"]))
                if found is None or found["entity"] != entity["entity"]:
                    moved += 1
                else:
                    pairs.append((entity["score"], found["score"]))
        self.compare(f"tag {name}: scores of {len(pairs)} tokens", pairs)
        if self.dtype == "f32":
            tell(f"f32 tag {name}: tokens with another label", moved, 0)

    def score(self, name: str) -> None:
        golden = [row for row in read(name)["rows"] if row["token_logprobs_f64"]]
        rows = self.run("score", name, [{"text": row["text"]} for row in golden], "--logprobs")
        ours = [[token["logprob"] for token in row["token_logprobs"]] for row in rows]
        self.compare(f"score {name}", flat(ours, [row["token_logprobs_f64"] for row in golden]), LOGPROBS[self.dtype])

    def generate(self, name: str) -> None:
        """Greedy tokens equal transformers' in f32; in half precision, whose near ties fall otherwise, only repeatability."""
        golden = next(case for case in read(name)["generation"] if case["name"] == "greedy")
        tokens = str(golden["options"]["max_new_tokens"])
        prompts = [{"text": prompt} for prompt in golden["prompts"]]
        flags = ["--max-tokens", tokens, "--ignore-eos"]
        rows = self.run("generate", name, prompts, *flags)
        if self.dtype == "f32":
            wrong = sum(row["completion"] != text for row, text in zip(rows, golden["one_by_one_text"]))
            tell(f"f32 generate {name}: other texts of {len(rows)}", wrong, 0)
            few = self.run("generate", name, prompts, *flags, "--kv-cache-memory", "1M", "--max-batch-tokens", "16")
            wrong = sum(row["completion"] != other["completion"] for row, other in zip(rows, few))
            tell(f"f32 generate {name}: other texts in other company", wrong, 0)
            chosen = self.run("generate", name, prompts, *flags, "--min-tokens", "1")
            wrong = sum(row["completion"] != other["completion"] for row, other in zip(rows, chosen))
            tell(f"f32 generate {name}: other texts where the host chooses", wrong, 0)
        else:
            print(f"{self.dtype} generate {name}: {len(rows)} texts, the same in two runs")


def read(name: str) -> dict:
    return json.loads((GOLDENS / "goldens" / f"{name}.json").read_text())


def flat(ours: list[list[float]], theirs: list[list[float]]) -> list[tuple[float, float]]:
    assert [len(row) for row in ours] == [len(row) for row in theirs], "another number of values"
    return [pair for row, other in zip(ours, theirs) for pair in zip(row, other)]


def tell(what: str, difference: float, tolerance: float) -> None:
    global failures
    failures += difference > tolerance
    print(f"{'ok  ' if difference <= tolerance else 'FAIL'} {what}: {difference:.2e} (at most {tolerance:.1e})", flush=True)


if __name__ == "__main__":
    main()
