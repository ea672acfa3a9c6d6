"""The task of short answers counts what a model writes, without regard to case and punctuation."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from blockpruner.engine.judge.tasks import Tasks

FOLDER = Path(__file__).parents[2] / "benchmarks/short_answers"
QUESTIONS = [json.loads(line) for line in (FOLDER / "short_answers.jsonl").read_text().splitlines()]


def scores(answers: list[str]) -> Any:
    def answer(kind: str, requests: list[Instance]) -> list[str]:
        assert kind == "generate_until"
        assert requests[1].args[0].endswith(f"Question: {QUESTIONS[1]['question']}\nAnswer:")
        return answers

    return Tasks(["short_answers"], FOLDER).evaluate(answer, limit=len(answers)).tasks["short_answers"]


def test_an_answer_counts_in_any_case_and_with_a_full_stop_and_nothing_else_does() -> None:
    right = QUESTIONS[0]["answers"][0]
    found = scores([f" {right}", f"{QUESTIONS[1]['answers'][0].upper()}.", f"{right} {right}", ""])
    assert found["score"] == pytest.approx(0.5)


def test_each_question_is_asked_once_and_is_not_among_those_shown() -> None:
    asked = [row["question"] for row in QUESTIONS]
    assert len(asked) == len(set(asked)) > 100
    assert not {question for question in asked if question in (FOLDER / "short_answers.py").read_text()}
