"""The functions of the task short_answers for lm-eval, which imports this file by its path."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from datasets import Dataset

SHOWN = (
    ("What is the capital of France?", "Paris"),
    ("What is the opposite of good?", "bad"),
    ("How many wheels does a car have?", "4"),
    ("What colour is the sky?", "blue"),
)


def load(**_: Any) -> dict[str, Dataset]:
    lines = (Path(__file__).parent / "short_answers.jsonl").read_text().splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def prompt(row: dict[str, Any]) -> str:
    shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in SHOWN)
    return f"{shown}Question: {row['question']}\nAnswer:"


def first_answer(row: dict[str, Any]) -> str:
    answer: str = row["answers"][0]
    return answer


def matches(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    return {"acc": float(_plain(answers[0]) in map(_plain, row["answers"]))}


def _plain(text: str) -> str:
    return text.translate(str.maketrans("", "", string.punctuation)).strip().lower()
