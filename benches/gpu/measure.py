"""Measures a CUDA build on a machine with an NVIDIA card, beside transformers on the same card, in one call.

    python benches/gpu/measure.py BINARY --results benches/gpu/results [--folder /dev/shm/mistral-batch]

In order: the card's ceilings (matmul and copy), the goldens (check.py), a seeded random model of Mistral-7B's shapes,
classification, generation. A short table comes last; all raw numbers, with date and card, go to a file in --results. Needs torch and
transformers for the ceilings and the comparison. --tiny --device cpu runs the whole script on a small model without a card,
to see that it works; its numbers mean nothing.
"""

import argparse
import datetime
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
          "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "sliding_window": 4096,
          "max_position_embeddings": 32768}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4096, "sliding_window": 64, "max_position_embeddings": 4096}
PRODUCT_ROWS = [1, 32, 256, 1024, 16384]
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/mistral-batch"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="ceilings,goldens,classify,generate")
    args = parser.parse_args()
    args.shapes = TINY if args.tiny else SHAPES
    args.dtype = "f32" if args.device == "cpu" else "bf16"
    args.steps = args.only.split(",")
    args.folder.mkdir(parents=True, exist_ok=True)
    cuda_libraries()

    results = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "card": card(), "tiny": args.tiny}
    ceilings = results["ceilings"] = measure_ceilings(args) if "ceilings" in args.steps else {}
    if "goldens" in args.steps:
        check = [sys.executable, str(ROOT / "benches/gpu/check.py"), args.binary, "--device", args.device]
        done = subprocess.run(check + (["--dtypes", "f32"] if args.device == "cpu" else []), capture_output=True, text=True)
        results["goldens"] = done.stdout.splitlines() + done.stderr.splitlines()
        print("\n".join(results["goldens"][-3:]), flush=True)
    make_model(args)
    if "classify" in args.steps:
        results["classify"] = classify(args)
    if "generate" in args.steps:
        results["generate"] = generate(args)
    table(results, ceilings)
    args.results.mkdir(parents=True, exist_ok=True)
    name = results["date"].replace(":", "").replace("+0000", "Z") + ".json"
    (args.results / name).write_text(json.dumps(results, indent=1) + "\n")
    print(f"raw results: {args.results / name}")


def cuda_libraries() -> None:
    """The CUDA libraries that Python packages bring, where the system has none."""
    import importlib.util

    folders = [os.environ.get("LD_LIBRARY_PATH", "")]
    spec = importlib.util.find_spec("nvidia")
    for package in list(spec.submodule_search_locations) if spec else []:
        folders += [str(path) for path in Path(package).glob("**/lib") if path.is_dir()]
    os.environ["LD_LIBRARY_PATH"] = ":".join(folder for folder in folders if folder)


def card() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def timed(work, synchronize, runs: int) -> float:
    """Median seconds of `work`, warmed up."""
    work()
    seconds = []
    for _ in range(runs):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure_ceilings(args) -> dict:
    import torch

    on_card = args.device != "cpu"
    device = "cuda" if on_card else "cpu"
    synchronize = torch.cuda.synchronize if on_card else (lambda: None)
    dtype = torch.bfloat16 if on_card else torch.float32

    def product(m: int, n: int, k: int) -> float:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        return 2 * m * n * k / timed(lambda: a @ b.T, synchronize, 20) / 1e12

    side, megabytes = (8192, 4096) if on_card else (512, 64)
    source = torch.empty(megabytes << 18, device=device)
    target = torch.empty_like(source)
    copied = timed(lambda: target.copy_(source), synchronize, 20)
    shapes = args.shapes
    hidden, heads = shapes["hidden_size"], shapes["num_attention_heads"] * shapes["head_dim"]
    qkv = heads + 2 * shapes["num_key_value_heads"] * shapes["head_dim"]
    wanted = [(qkv, hidden), (hidden, heads), (2 * shapes["intermediate_size"], hidden), (hidden, shapes["intermediate_size"])]
    rows = PRODUCT_ROWS if on_card else PRODUCT_ROWS[:2]
    ceilings = {
        "matmul_tflops": product(side, side, side),
        "copy_tb_per_s": 2 * source.numel() * 4 / copied / 1e12,
        "products_tflops": {f"{m}x{n}x{k}": product(m, n, k) for n, k in wanted for m in rows},
    }
    print(f"ceilings: {ceilings['matmul_tflops']:.1f} TFLOP/s, {ceilings['copy_tb_per_s']:.2f} TB/s", flush=True)
    return ceilings


def make_model(args) -> None:
    """A language model and a classifier of seeded random weights that share all files but that of their heads."""
    import torch
    from safetensors.torch import save_file

    base, shapes = args.folder / "weights", args.shapes
    args.models = {"lm": args.folder / "lm", "classifier": args.folder / "classifier"}
    if all((folder / "config.json").exists() for folder in args.models.values()):
        return
    base.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device="cuda" if args.device != "cpu" else "cpu").manual_seed(7)

    def matrix(*shape: int):
        values = torch.empty(*shape, device=generator.device, dtype=torch.float32).normal_(0, 0.02, generator=generator)
        return values.to(torch.bfloat16).cpu()

    hidden, inner, dim = shapes["hidden_size"], shapes["intermediate_size"], shapes["head_dim"]
    query, key = shapes["num_attention_heads"] * dim, shapes["num_key_value_heads"] * dim
    weight_map: dict[str, str] = {}

    def save(name: str, tensors: dict) -> None:
        save_file(tensors, base / name, metadata={"format": "pt"})
        weight_map.update({key: name for key in tensors})

    ones = lambda: torch.ones(hidden, dtype=torch.bfloat16)  # noqa: E731
    for layer in range(shapes["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        save(f"layer-{layer:02}.safetensors", {
            f"{at}.self_attn.q_proj.weight": matrix(query, hidden), f"{at}.self_attn.k_proj.weight": matrix(key, hidden),
            f"{at}.self_attn.v_proj.weight": matrix(key, hidden), f"{at}.self_attn.o_proj.weight": matrix(hidden, query),
            f"{at}.mlp.gate_proj.weight": matrix(inner, hidden), f"{at}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{at}.mlp.down_proj.weight": matrix(hidden, inner), f"{at}.input_layernorm.weight": ones(),
            f"{at}.post_attention_layernorm.weight": ones()})
    save("ends.safetensors", {"model.embed_tokens.weight": matrix(shapes["vocab_size"], hidden), "model.norm.weight": ones()})
    shared = dict(weight_map)
    heads = {"lm": ("MistralForCausalLM", {"lm_head.weight": matrix(shapes["vocab_size"], hidden)}),
             "classifier": ("MistralForSequenceClassification", {"score.weight": matrix(3, hidden)})}
    tokenizer = ROOT / "tests/goldens/checkpoints/lm-full-tied-bf16"
    for kind, (architecture, tensors) in heads.items():
        folder = args.models[kind]
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "head.safetensors", metadata={"format": "pt"})
        for name in set(shared.values()):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(base / name)
        index = {"metadata": {}, "weight_map": {**shared, **{key: "head.safetensors" for key in tensors}}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]:
            shutil.copy(tokenizer / name, folder / name)
        config = {**shapes, "architectures": [architecture], "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5,
                  "rope_theta": 10000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 1,
                  "eos_token_id": 2, "pad_token_id": 2, "id2label": {"0": "a", "1": "b", "2": "c"},
                  "label2id": {"a": 0, "b": 1, "c": 2}}
        (folder / "config.json").write_text(json.dumps(config))


def texts(args, lengths: list[int]) -> list[str]:
    """Texts of about so many tokens, cut to them exactly by the tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.models["lm"])
    rng = random.Random(3)
    words = [word for word in tokenizer.get_vocab() if word.isascii() and word.strip("▁").isalpha()]
    made = []
    for length in lengths:
        ids = tokenizer(" ".join(rng.choice(words).strip("▁") for _ in range(length)))["input_ids"][:length]
        made.append(tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False))
    return made


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


def ours(args, command: str, model: str, source: Path, *flags: str) -> dict:
    """The report's details of the median run."""
    runs = []
    for _ in range(ROUNDS):
        report = args.folder / "report.json"
        arguments = [args.binary, command, "-i", source, "-o", args.folder / "out.jsonl", "--model", args.models[model],
                     "--device", args.device, "--dtype", args.dtype, "--report", report, "--overwrite", "-q", *flags]
        subprocess.run([str(argument) for argument in arguments], check=True)
        runs.append(json.loads(report.read_text())["details"])
    runs.sort(key=lambda run: run["timings"]["pipeline_seconds"])
    return {**runs[len(runs) // 2], "all_pipeline_seconds": [run["timings"]["pipeline_seconds"] for run in runs]}


def load(args, kind: str):
    """Transformers' model and tokenizer, on the card."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    loader = AutoModelForCausalLM if kind == "lm" else AutoModelForSequenceClassification
    dtype = torch.bfloat16 if args.device != "cpu" else torch.float32
    model = loader.from_pretrained(args.models[kind], dtype=dtype, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.models[kind], padding_side="left")
    return model.to("cuda" if args.device != "cpu" else "cpu"), tokenizer


def classify(args) -> dict:
    import torch

    rng = random.Random(1)
    count, mean, longest = (4096, 512, 4096) if not args.tiny else (64, 40, 200)
    lengths = [min(longest, max(8, int(rng.lognormvariate(0, 0.8) * mean / 1.377))) for _ in range(count)]
    results: dict = {}
    for name, wanted in {"log-normal": lengths, "512 each": [min(512, longest)] * (count // 4), "4096 each": [longest] * (count // 32)}.items():
        rows = texts(args, wanted)
        results[name] = {"ours": ours(args, "classify", "classifier", write(args.folder / "rows.jsonl", rows))}
        if name != "log-normal":
            continue
        model, tokenizer = load(args, "classifier")
        ids = sorted((tokenizer(text)["input_ids"] for text in rows), key=len)
        tokens = sum(map(len, ids))
        for size in [16, 32, 64, 128]:
            batches = [ids[at:at + size] for at in range(0, len(ids), size)]
            padded = sum(len(batch) * len(batch[-1]) for batch in batches)

            def run() -> None:
                for batch in batches:
                    inputs = tokenizer.pad({"input_ids": batch}, return_tensors="pt").to(model.device)
                    with torch.inference_mode():
                        model(**inputs).logits.float().cpu()

            try:
                run()
                seconds = []
                for _ in range(ROUNDS):
                    started = time.perf_counter()
                    run()
                    seconds.append(time.perf_counter() - started)
                entry = {"tokens_per_second": tokens / statistics.median(seconds), "padding_percent": 100 * (padded - tokens) / padded}
            except torch.OutOfMemoryError:
                entry = {"out_of_memory": True}
            results[name][f"transformers sdpa, batches of {size}"] = entry
            print(f"transformers sdpa, batches of {size}: {entry}", flush=True)
        del model
        if args.device != "cpu":
            torch.cuda.empty_cache()
    return results


def generate(args) -> dict:
    import torch

    rng = random.Random(2)
    count, shortest, longest, new = (512, 128, 1024, 256) if not args.tiny else (16, 8, 40, 8)
    rows = texts(args, [rng.randint(shortest, longest) for _ in range(count)])
    flags = ["--max-tokens", str(new), "--ignore-eos", "--max-length", str(longest)]
    source = write(args.folder / "prompts.jsonl", rows)
    results = {"ours": ours(args, "generate", "lm", source, *flags)}
    single = write(args.folder / "one.jsonl", rows[:1])
    results["ours, one prompt"] = ours(args, "generate", "lm", single, *flags)
    model, tokenizer = load(args, "lm")
    ids = [tokenizer(text)["input_ids"][:longest] for text in rows]

    def static(size: int = 64) -> None:
        order = sorted(ids, key=len)
        for at in range(0, len(order), size):
            inputs = tokenizer.pad({"input_ids": order[at:at + size]}, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    def continuous() -> None:
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=2)
        model.generate_batch(ids, generation_config=config)

    for name, work in {"transformers generate, batches of 64": static, "transformers generate_batch": continuous}.items():
        try:
            started = time.perf_counter()
            work()
            results[name] = {"new_tokens_per_second": count * new / (time.perf_counter() - started)}
        except Exception as error:  # whatever this version of transformers does not do on this card
            results[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(f"{name}: {results[name]}", flush=True)
    results["new_tokens"] = count * new
    return results


def table(results: dict, ceilings: dict) -> None:
    """The short table: rates, and what share of the ceilings they are."""
    print(f"\n{results['card']}, {results['date']}")
    for name, engines in results.get("classify", {}).items():
        for engine, entry in engines.items():
            rate = entry.get("tokens_per_second", 0)
            share = ""
            if ceilings and not results["tiny"]:
                share = f", {100 * rate * 13.96e9 / (ceilings['matmul_tflops'] * 1e12):.0f}% of the matmul ceiling"
            busy = f", busy {entry['model_busy_percent']:.1f}%" if "model_busy_percent" in entry else ""
            print(f"classify, {name}, {engine}: {rate:,.0f} tokens/s{share}{busy}")
    generated = results.get("generate", {})
    for name, entry in generated.items():
        if isinstance(entry, dict) and "timings" in entry:
            new = generated["new_tokens"] if name == "ours" else generated["new_tokens"] // (512 if not results["tiny"] else 16)
            rate = new / entry["timings"]["pipeline_seconds"]
            print(f"generate, {name}: {rate:,.0f} new tokens/s, busy {entry['model_busy_percent']:.1f}%")
        elif isinstance(entry, dict):
            print(f"generate, {name}: {entry}")


if __name__ == "__main__":
    main()
