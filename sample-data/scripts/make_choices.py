"""Answers to sorting questions, right and wrong, for models/digit-sorter to rank by their likelihood.

    python make_choices.py SAMPLE_DATA_DIR

    sorting-choices.parquet           100 questions of sorting.parquet as the chat template renders them, 3 answers each
    sorting-choices-expected.parquet  each answer's log-likelihood by transformers
"""

import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, MistralForCausalLM

root = Path(sys.argv[1])
folder = root / "models" / "digit-sorter"
tok = AutoTokenizer.from_pretrained(folder)
model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
rng = random.Random(45)
table = {"question": [], "context": [], "continuation": [], "right": []}
for row in pq.read_table(root / "sorting.parquet").to_pylist():
    digits = row["answer"].split()
    wrong = set()
    while len(set(digits)) > 2 and len(wrong) < 2:
        rng.shuffle(digits)
        wrong.add(" ".join(digits))
        wrong.discard(row["answer"])
    if len(wrong) < 2 or len(table["question"]) == 300:
        continue
    asked = tok.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
    answers = sorted([row["answer"], *wrong])
    for answer in answers:
        table["question"].append(row["id"])
        table["context"].append(asked.removeprefix(tok.bos_token))  # the tokenizer adds it
        table["continuation"].append(" " + answer)
        table["right"].append(answer == row["answer"])
pq.write_table(pa.table(table), root / "sorting-choices.parquet", compression="zstd")

logprobs, tokens = [], []
for context, continuation in zip(table["context"], table["continuation"]):
    given = len(tok(context)["input_ids"])
    ids = torch.tensor([tok(context + continuation)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0].double().log_softmax(-1)
    scored = ids[0, given:]
    logprobs.append(logits[given - 1:-1].gather(1, scored[:, None]).sum().item())
    tokens.append(len(scored))
expected = {"logprob": logprobs, "scored_tokens": pa.array(tokens, pa.uint32())}
pq.write_table(pa.table(expected), root / "sorting-choices-expected.parquet", compression="zstd")
best = [max(range(i, i + 3), key=logprobs.__getitem__) for i in range(0, len(logprobs), 3)]
print(sum(table["right"][i] for i in best), "of", len(best), "questions rank the right answer first", table["context"][0], table["continuation"][:3])
