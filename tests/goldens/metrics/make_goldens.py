"""Computes the metrics' reference values with the libraries that define them.

    pip install scikit-learn==1.9.1 scipy==1.17.1 seqeval==1.2.2 sacrebleu==2.6.0 rouge-score==0.1.2
    pip install --no-deps lm_eval==0.4.13   # with typing_extensions, jinja2, requests, pyyaml; its metrics need no torch
    python tests/goldens/metrics/make_goldens.py

Inputs are drawn from a fixed seed; inputs and values go to the JSON files beside this script.
"""

import importlib.metadata
import json
import pathlib
import re
import runpy

import lm_eval
import numpy as np
import sacrebleu
import scipy.stats
import sklearn.calibration
import sklearn.metrics as sk
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.filters.extraction import RegexFilter
from rouge_score.rouge_scorer import RougeScorer
from seqeval.metrics import classification_report as seqeval_report
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2

OUT = pathlib.Path(__file__).parent
# By path, because the package around it needs `datasets`.
wikitext = runpy.run_path(pathlib.Path(lm_eval.__file__).parent / "tasks/wikitext/preprocess_wikitext.py")
rng = np.random.default_rng(20261124)


def write(name, **content):
    versions = ["scikit-learn", "scipy", "numpy", "seqeval", "sacrebleu", "rouge-score"]
    content["versions"] = {v: importlib.metadata.version(v) for v in versions} | {"lm_eval": "0.4.13"}
    text = json.dumps(content, ensure_ascii=False, indent=None, separators=(",", ":"), allow_nan=False)
    (OUT / f"{name}.json").write_text(text.replace('],"', '],\n"').replace('},{', '},\n{') + "\n")


def classification():
    cases = []
    for classes, rows, skill in [(2, 50, 0.8), (5, 300, 0.7), (4, 40, 0.3), (3, 12, 1.0), (3, 9, 0.0)]:
        truth = rng.integers(0, classes, rows)
        if classes == 4:
            truth[truth == 3] = 0  # a class that is never true
        predicted = np.where(rng.random(rows) < skill, truth, rng.integers(0, classes, rows))
        if skill == 0.0:
            predicted[:] = 1  # MCC undefined: 0
        labels = list(range(classes))
        p, r, f, s = sk.precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
        probabilities = rng.dirichlet(np.ones(classes), rows)
        probabilities[np.arange(rows), predicted] += 1
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        cases.append(dict(
            classes=classes, truth=truth.tolist(), predicted=predicted.tolist(),
            accuracy=sk.accuracy_score(truth, predicted),
            macro_f1=sk.f1_score(truth, predicted, average="macro", zero_division=0),
            micro_f1=sk.f1_score(truth, predicted, average="micro", zero_division=0),
            precision=p.tolist(), recall=r.tolist(), f1=f.tolist(), support=s.tolist(),
            mcc=sk.matthews_corrcoef(truth, predicted),
            confusion=sk.confusion_matrix(truth, predicted, labels=labels).tolist(),
            probabilities_of_truth=probabilities[np.arange(rows), truth].tolist(),
            log_loss=sk.log_loss(truth, probabilities, labels=labels),
        ))
    write("classification", cases=cases)


def calibration():
    cases = []
    for bins, rows in [(15, 400), (10, 30), (5, 5)]:
        confidence = np.round(rng.beta(4, 1.5, rows), 4)
        confidence[:5] = [0.0, 0.2, 0.4, 0.6, 1.0]  # bins' edges
        right = rng.random(rows) < confidence**1.4
        accuracy, mean_confidence = sklearn.calibration.calibration_curve(right, confidence, n_bins=bins)
        # scikit-learn leaves empty bins out and gives no counts; these are its own bins.
        edges = np.linspace(0.0, 1.0, bins + 1)
        counts = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=bins)
        weights = counts[counts > 0] / rows
        cases.append(dict(
            bins=bins, confidence=confidence.tolist(), right=right.tolist(), counts=counts.tolist(),
            bin_accuracy=accuracy.tolist(), bin_confidence=mean_confidence.tolist(),
            ece=float(np.sum(weights * np.abs(accuracy - mean_confidence))),  # Guo et al. 2017, equation 3
        ))
    write("calibration", cases=cases)


def multi_label():
    cases = []
    for classes, rows in [(4, 60), (3, 5)]:
        truth = (rng.random((rows, classes)) < 0.4).astype(int)
        predicted = np.where(rng.random((rows, classes)) < 0.75, truth, 1 - truth)
        p, r, f, s = sk.precision_recall_fscore_support(truth, predicted, zero_division=0)
        cases.append(dict(
            classes=classes,
            truth=[np.flatnonzero(row).tolist() for row in truth],
            predicted=[np.flatnonzero(row).tolist() for row in predicted],
            subset_accuracy=sk.accuracy_score(truth, predicted),
            macro_f1=sk.f1_score(truth, predicted, average="macro", zero_division=0),
            micro_f1=sk.f1_score(truth, predicted, average="micro", zero_division=0),
            precision=p.tolist(), recall=r.tolist(), f1=f.tolist(), support=s.tolist(),
        ))
    write("multi_label", cases=cases)


def tagging():
    cases = []
    tags = ["O", "O", "O", "B-PER", "I-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG"]
    for rows, skill in [(40, 0.85), (3, 0.5)]:
        truth = [[tags[i] for i in rng.integers(0, len(tags), rng.integers(1, 15))] for _ in range(rows)]
        predicted = [[t if rng.random() < skill else tags[rng.integers(0, len(tags))] for t in row] for row in truth]
        case = dict(truth=truth, predicted=predicted)
        for mode, options in [("conll", {}), ("strict", dict(mode="strict", scheme=IOB2))]:
            report = seqeval_report(truth, predicted, output_dict=True, zero_division=0, **options)
            case[mode] = {k: {m: float(v) for m, v in scores.items()} for k, scores in report.items()}
        case["conll_entities"] = [[[start, end + 1, kind] for kind, start, end in get_entities(row)] for row in truth]
        cases.append(case)
    write("tagging", cases=cases)


def regression():
    cases = []
    for truth, predicted in [
        (rng.normal(3, 2, 80), None),
        (np.round(rng.normal(0, 2, 60)), None),  # ties
        (np.array([1.0, 2.0, 2.0, 4.0]), np.array([2.0, 1.0, 1.0, -3.0])),
    ]:
        if predicted is None:
            predicted = np.round(truth * 0.8 + rng.normal(0, 1, len(truth)), 1)
        cases.append(dict(
            truth=truth.tolist(), predicted=predicted.tolist(),
            mse=sk.mean_squared_error(truth, predicted), mae=sk.mean_absolute_error(truth, predicted),
            pearson=float(scipy.stats.pearsonr(truth, predicted)[0]),
            spearman=float(scipy.stats.spearmanr(truth, predicted)[0]),
        ))
    write("regression", cases=cases)


# SQuAD's evaluate-v1.1.py, as published (normalize_answer, f1_score).
def normalize_answer(s):
    import string
    s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())


def squad_f1(prediction, truth):
    from collections import Counter
    prediction, truth = normalize_answer(prediction).split(), normalize_answer(truth).split()
    same = sum((Counter(prediction) & Counter(truth)).values())
    if same == 0:
        return 0
    precision, recall = same / len(prediction), same / len(truth)
    return 2 * precision * recall / (precision + recall)


TEXTS = [  # reference, hypothesis
    ("The quick brown fox jumps over the lazy dog.", "A quick brown fox jumped over the lazy dog."),
    ("It costs $1,234.50, doesn't it?", "It costs $1234.5 , does n't it ?"),
    ("Paris", "paris!"),
    ("the an a", "The A. An"),
    ("in 1999-2000 they sold 3.5 million; 12-inch records", "In 1999-2000, 3.5 million 12-inch records were sold."),
    ("naïve café — l’été à Zürich", "naive café: the été in Zürich"),
    ("&quot;Tom &amp; Jerry&quot; <skipped>end-\nof line", "\"Tom & Jerry\" end of line"),
    ("北京是中国的首都", "北京 是 首都"),
    ("Die Katze\tsitzt  auf der Matte\n", "Die Katze saß auf der Matte"),
    ("one two three four five six seven", "one two three four five six seven"),
    ("short", "a much longer hypothesis than the reference was, by far"),
    ("words that differ", "nothing in common"),
    ("empty hypothesis", ""),
    ("anthem athena a-the an_the", "anthem athena athe anthe"),
    ("semi;colon:slash/back\\slash [brackets] {braces} ~tilde^caret`tick", "semi ; colon : slash / back \\ slash [ brackets ]"),
    ("3.14.15 .5 5. a.b,c", "3.14 .15 0.5 5 a . b , c"),
]


def generation():
    scorer = RougeScorer(["rougeL"])
    rows = [dict(
        truth=t, predicted=p, normalized=[normalize_answer(t), normalize_answer(p)], token_f1=squad_f1(p, t),
        rouge_l=scorer.score(t, p)["rougeL"].fmeasure,
        bleu=sacrebleu.corpus_bleu([p], [[t]]).score, chrf=sacrebleu.corpus_chrf([p], [[t]]).score,
    ) for t, p in TEXTS]
    truths, predictions = [t for t, _ in TEXTS], [p for _, p in TEXTS]
    bleu = sacrebleu.corpus_bleu(predictions, [truths])
    corpus = dict(
        bleu=lm_eval_metrics.bleu(list(zip(truths, predictions))), chrf=lm_eval_metrics.chrf(list(zip(truths, predictions))),
        bleu_counts=bleu.counts, bleu_totals=bleu.totals, bleu_hypothesis=bleu.sys_len, bleu_reference=bleu.ref_len,
        exact_match=float(lm_eval_metrics.exact_match_hf_evaluate(predictions, truths)["exact_match"]),
    )
    assert corpus["bleu"] == bleu.score
    patterns = [r"#### (-?[0-9.,]+)", r"[0-9]+", r"(?:answer is|Answer:)\s*(\w+)|^(\w+)$"]
    outputs = ["So 3+4.\n#### 7", "The answer is  Paris .", "yes", "none here 42, 43", "#### -1,000.5 and #### 3", ""]
    extraction = [
        dict(pattern=p, text=t, found=RegexFilter(p, group_select=0, fallback="[none]").apply([[t]], [{}])[0][0])
        for p in patterns for t in outputs
    ]
    write("generation", rows=rows, corpus=corpus, extraction=extraction)


def multiple_choice():
    documents = []
    words = ["Paris", "a large city", "Zürich, été", "北京", "x", "the very long answer that says it all"]
    for _ in range(40):
        choices = [words[i] for i in rng.permutation(len(words))[: rng.integers(2, 6)]]
        lls = np.array([-rng.gamma(2 + 0.4 * len(c), 1.5) for c in choices])
        # lm_eval/api/task.py, ConfigurableTask.process_results, output type multiple_choice
        completion_len = np.array([float(len(i)) for i in choices])
        byte_length = np.array([float(len(i.encode("utf-8"))) for i in choices])
        documents.append(dict(
            choices=choices, logprobs=lls.tolist(), none=int(np.argmax(lls)),
            characters=int(np.argmax(lls / completion_len)), bytes=int(np.argmax(lls / byte_length)),
        ))
    write("multiple_choice", documents=documents)


def perplexity():
    texts = ["One line of plain text.", " leading and trailing \n", "naïve café\n\n — 北京", "tabs\tand  spaces", "x", ""]
    rows = []
    for text in texts:
        logprob = -float(rng.gamma(5, 4))
        result = wikitext["process_results"]({"page": text}, [logprob])
        rows.append(dict(text=text, logprob=logprob, tokens=len(text) // 3 + 1,
                         words=result["word_perplexity"][1], bytes=result["byte_perplexity"][1]))
    pairs = lambda key: [(r["logprob"], r[key]) for r in rows]
    write(
        "perplexity", rows=rows,
        word_perplexity=lm_eval_metrics.weighted_perplexity(pairs("words")),
        byte_perplexity=lm_eval_metrics.weighted_perplexity(pairs("bytes")),
        token_perplexity=lm_eval_metrics.weighted_perplexity(pairs("tokens")),
        bits_per_byte=lm_eval_metrics.bits_per_byte(pairs("bytes")),
    )


MASK = (1 << 64) - 1


def split_mix(state):
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def bootstrap():
    values, other = np.round(rng.normal(0.7, 0.2, 50), 3), np.round(rng.normal(0.62, 0.2, 50), 3)
    seed, resamples, n = 7, 200, len(values)
    draws = [[(split_mix(split_mix(seed ^ split_mix(r)) ^ i) * n) >> 64 for i in range(n)] for r in range(resamples)]
    means = np.array([values[d].mean() for d in draws])
    scipy_interval = scipy.stats.bootstrap((values,), np.mean, confidence_level=0.95, n_resamples=20000,
                                           method="percentile", rng=np.random.default_rng(1)).confidence_interval
    write(
        "bootstrap", values=values.tolist(), other=other.tolist(), seed=seed, resamples=resamples, means=means.tolist(),
        interval_95=np.percentile(means, [2.5, 97.5]).tolist(), interval_80=np.percentile(means, [10, 90]).tolist(),
        scipy_interval_95=[float(scipy_interval.low), float(scipy_interval.high)],
        # the permutation test of the same question; the two p-values agree to a few percent of themselves
        scipy_permutation_p=float(scipy.stats.permutation_test(
            (values, other), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=20000,
            rng=np.random.default_rng(1)).pvalue),
        mcnemar=[[b, c, scipy.stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0]
                 for b, c in [(0, 0), (1, 0), (5, 5), (2, 11), (11, 2), (40, 70), (0, 60), (900, 1100)]],
    )


for make in [classification, calibration, multi_label, tagging, regression, generation, multiple_choice, perplexity, bootstrap]:
    make()
