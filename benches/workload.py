"""Writes the reference workload: a random 100M-parameter Mistral and 512 texts of log-normal length.

    python benches/workload.py DIR

DIR/checkpoint is the classifier in f32 and DIR/lm the causal LM in bf16; DIR/checkpoint-bf16 and DIR/lm-f32 the other way round.
DIR/texts.parquet has the texts.
"""

import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, MistralForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent.parent / "sample-data" / "scripts"))
import corpus  # noqa: E402
import tokenizer_factory  # noqa: E402


def main(root: Path) -> None:
    checkpoint = root / "checkpoint"
    spec = tokenizer_factory.TokenizerSpec("bench", 4096, 11, "eos", "alternate")
    trained = tokenizer_factory.train(spec)
    config = MistralConfig(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                           num_attention_heads=12, num_key_value_heads=4, sliding_window=1024,
                           max_position_embeddings=4096, rms_norm_eps=1e-5, pad_token_id=2,
                           rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    config.id2label = {0: "low", 1: "medium", 2: "high"}
    config.label2id = {label: i for i, label in config.id2label.items()}
    for model, stored in ((MistralForSequenceClassification, {"checkpoint": torch.float32, "checkpoint-bf16": torch.bfloat16}),
                          (MistralForCausalLM, {"lm-f32": torch.float32, "lm": torch.bfloat16})):
        torch.manual_seed(5)
        model = model(config).eval()
        for folder, dtype in stored.items():
            model.to(dtype).save_pretrained(root / folder)
            tokenizer_factory.write(spec, trained, root / folder)

    tok = AutoTokenizer.from_pretrained(checkpoint)
    rng = random.Random(9)
    texts = []
    for _ in range(512):
        wanted = min(1024, max(4, int(rng.lognormvariate(4.7875, 0.8))))  # median 120
        words = corpus.paragraph(rng, wanted // 12 + 2).split(" ")
        while len(tok(" ".join(words))["input_ids"]) > wanted and len(words) > 1:
            excess = len(tok(" ".join(words))["input_ids"]) - wanted
            words = words[:-max(1, excess // 2)]
        texts.append(" ".join(words))
    lengths = sorted(len(ids) for ids in tok(texts)["input_ids"])
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), root / "texts.parquet")
    print(json.dumps({"texts": len(texts), "tokens": sum(lengths), "median": lengths[256], "max": lengths[-1]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
