"""Trains a small MistralModel that puts a question near the help article that answers it.

    python make_embedder.py SAMPLE_DATA_DIR

    models/article-finder/      hidden 64, 2 layers; the tokenizer of models/ticket-classifier
    questions.parquet           30 articles, and 10 questions for each that training did not see
    questions-expected.parquet  their embeddings by transformers: mean of the last hidden states, normalised
"""

import json
import math
import random
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from transformers import AutoTokenizer, MistralConfig, MistralModel

import corpus
from make_demo import TICKETS, date, typo, unique

# In the order of TICKETS: the article that answers each of its messages.
ARTICLES = {
    "account_access": [
        "Signing in: check your address, clear the browser's cookies and try the link in the welcome mail.",
        "Forgotten passwords: ask for a new reset link and look into the spam folder.",
        "Locked accounts open again after one hour, or when an administrator unlocks them.",
        "Two-factor codes depend on the clock of your phone; set it to network time.",
        "Restoring a workspace: an owner can bring it back within thirty days.",
        "Lost phones: use one of the recovery codes instead of the second factor."],
    "billing": [
        "Double charges are reversed within five days once both payments have settled.",
        "Refunds go back to the card that paid, minus what was used.",
        "Correcting an invoice: we issue a credit note and a new invoice.",
        "Cancelling ends the subscription with the running period; later renewals are returned.",
        "Price changes are announced sixty days ahead and depend on the number of seats.",
        "Receipts show a tax number when it is stored in the company profile."],
    "bug": [
        "When saving makes a program close, install the current version and send us the crash log.",
        "Blank screens come from blocked scripts; allow our domain in the content filter.",
        "Error codes and what they mean, with the steps that clear each of them.",
        "Uploads of many files can stall; split them into batches of one hundred.",
        "Wrong totals after an update disappear once the cache of figures is rebuilt.",
        "Unsaved edits are kept as drafts; going back no longer drops them."],
    "feature_request": [
        "Themes: the plan for dark colours and high contrast.",
        "Keyboard control: the list of shortcuts and those that are planned.",
        "Exports: limits on rows, formats, and how larger tables will be served.",
        "Scheduled summaries by mail: what the weekly digest will contain.",
        "Grouping and folders: how items will be put together.",
        "Integrations: the chat systems that we plan to connect."],
    "praise": [
        "Stories from customers: tell us what you like, and we may print it.",
        "How our support team works, and how to thank an agent by name.",
        "What saves time: habits of teams that finish their week early.",
        "Speed: how pages became faster this year.",
        "The people behind the product, and how to write to them all.",
        "Loyalty: what long-standing customers receive."],
}
PARTS = [(topic, i) for topic in sorted(TICKETS) for i in range(6)]
OPENINGS = ["", "", "", "Hi, ", "Hello team, ", "Quick question: ", "Please help: ", "Just so you know, "]


def question(rng) -> tuple[str, int]:
    place = rng.randrange(len(PARTS))
    topic, i = PARTS[place]
    core = TICKETS[topic][i].format(p=rng.choice(corpus.PRODUCTS), d=date(rng), n=rng.randint(2, 990))
    text = rng.choice(OPENINGS) + core
    text = text[0].upper() + text[1:] + rng.choice([".", "!", ", " + rng.choice(corpus.FILLERS) + ".", "?"])
    if rng.random() < 0.3:
        text += " " + corpus.sentence(rng)
    return typo(rng, text, 0.01), place


def embed(model, tok, texts):
    """Mean of the last hidden states of each text's tokens, of length 1."""
    inputs = tok(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"]
    hidden = model(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=-1)


def train(model, tok, rows, articles, steps=400, batch=30, rate=3e-3, scale=20.0) -> None:
    """Each question's own article against the 29 others (InfoNCE)."""
    rng = random.Random(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 40) * 0.5 * (1 + math.cos(math.pi * step / steps))
        part = rng.sample(rows, batch)
        both = embed(model, tok, [text for text, _ in part] + articles)
        scores = scale * both[:batch] @ both[batch:].T
        loss = torch.nn.functional.cross_entropy(scores, torch.tensor([place for _, place in part]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step} loss {loss.item():.4f}", flush=True)
    model.eval()


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    folder = root / "models" / "article-finder"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(root / "models" / "ticket-classifier" / name, folder / name)
    tok = AutoTokenizer.from_pretrained(folder)
    config = MistralConfig(vocab_size=len(tok), hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=64,
                           max_position_embeddings=512, rms_norm_eps=1e-5, pad_token_id=tok.pad_token_id,
                           rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    torch.manual_seed(7)
    model = MistralModel(config)

    articles = [ARTICLES[topic][i] for topic, i in PARTS]
    rows = unique(question, random.Random(44), 6000)
    test = [[row for row in rows[5000:] if row[1] == place][:10] for place in range(len(PARTS))]
    train(model, tok, rows[:5000], articles)
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    table = {"id": [], "text": [], "kind": [], "topic": [], "article": []}
    for place, (topic, _) in enumerate(PARTS):
        texts = [("article", articles[place])] + [("question", text) for text, _ in test[place]]
        for number, (kind, text) in enumerate(texts):
            name = f"article-{place:02d}"
            table["id"].append(name if kind == "article" else f"question-{place:02d}-{number - 1}")
            table["text"].append(text)
            table["kind"].append(kind)
            table["topic"].append(topic)
            table["article"].append(name)
    pq.write_table(pa.table(table), root / "questions.parquet", compression="zstd")

    model = MistralModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        # One by one, so that nothing is padded.
        vectors = torch.cat([embed(model, tok, [text]) for text in table["text"]])
    width = vectors.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.flatten().tolist(), pa.float32()), width)
    pq.write_table(pa.table({"id": table["id"], "embedding": column}), root / "questions-expected.parquet", compression="zstd")

    is_article = torch.tensor([kind == "article" for kind in table["kind"]])
    nearest = (vectors[~is_article] @ vectors[is_article].T).argmax(1).tolist()
    wanted = [int(name[-2:]) for name, kind in zip(table["article"], table["kind"]) if kind == "question"]
    right = sum(a == b for a, b in zip(nearest, wanted))
    print(f"{right} of {len(wanted)} questions are nearest to their article; {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    main()
