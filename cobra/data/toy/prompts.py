"""The wording of `configs/benchmark/*.yaml`, by benchmark: what training asks must be what evaluation asks."""

from __future__ import annotations

_SHORT = "{question}\nAnswer the question using a single word or phrase."

PROMPTS = {
    "vqav2": _SHORT,
    "gqa": _SHORT,
    "pope": _SHORT,
    "vizwiz": "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
    "vsr": 'Based on the image, is this statement "True" or "False"? {question}\n'
    'Respond with "True" or "False" directly.',
    "refcoco": 'Please provide the bounding box coordinate of the region this sentence describes: "{question}"',
    "ocr_first": "Reference OCR token: {ocr}\n" + _SHORT,
    "ocr_last": "{question}\nReference OCR token: {ocr}\nAnswer the question using a single word or phrase.",
    "no_ocr": _SHORT,
}


def ask(prompt: str, question: str, ocr: str = "") -> str:
    """Return the message of a question, worded as the benchmark (or the prompt order of TextVQA) does."""
    return PROMPTS[prompt].replace("{ocr}", ocr).replace("{question}", question)
