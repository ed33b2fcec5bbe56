"""The messages that models are asked, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest
from official import FOLDERS, configured

from cobra.eval.benchmark import Box, Choices, FreeText

SHORT = "\nAnswer the question using a single word or phrase."
FIRST = {
    "gqa": "Round the of is the what q20?" + SHORT,
    "vizwiz": "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
    "vsr": 'Based on the image, is this statement "True" or "False"? The car is behind the suitcase.\n'
    'Respond with "True" or "False" directly.',
    "pope": "Is there a snowboard in the image?" + SHORT,
}


@pytest.mark.parametrize("name", FIRST)
def test_message(assets: Path, name: str) -> None:
    questions = configured(name, assets / "fixtures" / "scorers" / "data_root").questions()
    assert questions[0].text == FIRST[name]
    assert all(question.text == question.text.strip() for question in questions)


def test_message_of_vqav2(assets: Path) -> None:
    texts = {q.id: q.text for q in configured("vqav2", assets / "fixtures/scorers/data_root").questions()}
    assert texts["300097000"] == f"Small the of round is what q25?{SHORT}"


def test_messages_of_textvqa(assets: Path) -> None:
    texts = {q.id: q.text for q in configured("textvqa", assets / "fixtures/scorers/data_root").questions()}
    question, ocr = "left big today round that small window is q2?", "Reference OCR token: DAKOTA, DIGITAL"
    assert texts["34604/ocr_first"] == f"{ocr}\n{question}{SHORT}"
    assert texts["34604/ocr_last"] == f"{question}\n{ocr}{SHORT}"
    assert texts["34604/no_ocr"] == f"{question}{SHORT}"
    assert len(texts) == 3 * 109


def test_message_of_refcoco(assets: Path) -> None:
    texts = {q.id: q.text for q in configured("refcoco", assets / "fixtures/scorers/data_root").questions()}
    assert texts["RefCOCO/0/0"] == (
        'Please provide the bounding box coordinate of the region this sentence describes: "man on left 0"'
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_kind_of_answer(assets: Path, name: str) -> None:
    kinds = {q.answer for q in configured(name, assets / "fixtures/scorers/data_root").questions()}
    words = {"pope": Choices(words=("Yes", "No")), "vsr": Choices(words=("True", "False"))}
    assert kinds == {words.get(name, Box() if name == "refcoco" else FreeText())}


@pytest.mark.parametrize("name", FOLDERS)
def test_images_exist_and_ids_are_unique(assets: Path, name: str) -> None:
    questions = configured(name, assets / "fixtures/scorers/data_root").questions()
    assert all(question.image.is_file() for question in questions)
    assert len({question.id for question in questions}) == len(questions)
