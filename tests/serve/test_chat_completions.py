"""The server as the official client sees it: the same answers as `Cobra.generate`, in OpenAI's form."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from cobra.api import Cobra

ASK = "what color is the circle?"
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*content: Any) -> dict[str, Any]:
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    return {"role": "user", "content": parts}


def ask(client: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": list(messages), "max_tokens": 12} | options  # type: ignore[arg-type]
    )


def text(client: openai.OpenAI, *messages: Any, **options: Any) -> str:
    return ask(client, *messages, **options).choices[0].message.content


@torch.no_grad()
def greedy(vlm: Cobra, pieces: list[str | Image.Image], num_tokens: int = 12) -> str:
    """The whole sequence again for every token: no states, no batches. Texts are in the prompt format already."""
    parts = []
    for piece in pieces:
        if isinstance(piece, str):
            parts.append(vlm.model.llm.embed(torch.tensor([vlm.tokenizer.encode(piece)])))
        else:
            parts.append(vlm.model.embed_images([view[None] for view in vlm.prepare_image(piece).views]))
    read, answer = torch.cat(parts, dim=1), []
    for _ in range(num_tokens):
        hidden, _ = vlm.model.llm(read)
        answer.append(int(vlm.model.llm.head(hidden[:, -1])[0, : vlm.model.config.llm.vocab_size].argmax()))
        read = torch.cat([read, vlm.model.llm.embed(torch.tensor([answer[-1:]]))], dim=1)
    return vlm.tokenizer.decode(answer).strip()


def test_text_is_answered_as_by_generate(client: openai.OpenAI, vlm: Cobra) -> None:
    answer = ask(client, {"role": "user", "content": ASK})
    assert answer.choices[0].message.content == vlm.generate(None, ASK, max_new_tokens=12) != ""
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", "tiny", "length")
    prompt = len(vlm.tokenizer.encode(vlm.prompt.question(ASK)))
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": prompt,
        "completion_tokens": 12,
        "total_tokens": prompt + 12,
    }


def test_images_are_read_and_counted(client, vlm: Cobra, pictures, image_urls) -> None:
    answers = [ask(client, user(ASK, image_part(url))) for url in image_urls]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts == vlm.generate(pictures, ASK, max_new_tokens=12)
    assert len({*texts, text(client, user(ASK))}) == 4  # the image matters
    prompt = len(vlm.tokenizer.encode(vlm.prompt.question(ASK)))
    assert answers[0].usage.prompt_tokens == prompt + vlm.model.num_image_tokens


def test_stream_joins_to_the_answer(client, vlm: Cobra, pictures, image_urls) -> None:
    message = user(image_part(image_urls[0]), ASK)
    chunks = list(ask(client, message, stream=True, stream_options={"include_usage": True}, max_tokens=40))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == vlm.generate(
        pictures[0], ASK, max_new_tokens=40
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in pieces][-1] == "length"
    assert {chunk.usage for chunk in pieces} == {None}
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    whole = ask(client, message, max_tokens=40).usage
    assert last.choices == [] and last.usage == whole
    assert len(pieces) > 5


def test_drawn_answers_have_seeds_of_their_own(client, vlm: Cobra) -> None:
    drawn = {"temperature": 1.0, "top_p": 0.9}
    answer = ask(client, user(ASK), n=3, seed=7, **drawn, extra_body={"top_k": 50})
    expected = vlm.generate(None, [ASK] * 3, max_new_tokens=12, seed=7, top_k=50, **drawn)
    assert [choice.message.content for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(expected)) == 3
    chunks = list(ask(client, user(ASK), n=3, seed=7, **drawn, extra_body={"top_k": 50}, stream=True))
    streamed = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == expected
    assert text(client, user(ASK), **drawn) != text(client, user(ASK), **drawn)  # without a seed


def test_stop_strings_end_an_answer(client, vlm: Cobra) -> None:
    whole = vlm.generate(None, ASK, max_new_tokens=12)
    stop = whole[4:6]
    answer = ask(client, user(ASK), stop=["never there", stop])
    assert answer.choices[0].message.content == vlm.generate(None, ASK, max_new_tokens=12, stop=stop)
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < 12
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, user(ASK), stop=stop, stream=True)]
    assert "".join(pieces) == answer.choices[0].message.content


def test_end_token_ends_an_answer(serve, vlm: Cobra, monkeypatch) -> None:
    ids = vlm.tokenizer.encode(vlm.prompt.question(ASK))
    with torch.no_grad():
        logits = vlm.model(torch.tensor([ids])).logits[0, -1]
    monkeypatch.setattr(vlm.tokenizer, "end_id", int(logits.argmax()))
    with serve() as running:
        answer = ask(running.client(), user(ASK))
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", "")
    assert answer.usage.completion_tokens == 0


def test_history_is_read_in_the_prompt_format(client, vlm: Cobra, pictures, image_urls) -> None:
    """Images stand before the text of their turn, wherever that is."""
    form = vlm.prompt
    first, second = form.question("one"), form.question("two", is_first=False)
    said = {"role": "assistant", "content": "yes"}
    urls, images = [image_part(url) for url in image_urls], pictures
    cases: list[tuple[list[Any], list[Any]]] = [
        ([user("one"), said, user("two")], [first, form.answer("yes"), second]),
        ([user("one", urls[0]), said, user("two")], [images[0], first, form.answer("yes"), second]),
        ([user("one"), said, user("two", urls[1])], [first, form.answer("yes"), images[1], second]),
        (
            [user(urls[0], "one", urls[1]), said, user(urls[2], "two")],
            [images[0], images[1], first, form.answer("yes"), images[2], second],
        ),
        ([{"role": "system", "content": "be"}, user("on"), user("e")], [form.question("be\non\ne")]),
    ]
    answers = [text(client, *messages) for messages, _ in cases]
    assert answers == [greedy(vlm, pieces) for _, pieces in cases]
    assert len(set(answers)) == len(cases)


def test_answer_without_content_is_empty(client, vlm: Cobra) -> None:
    form = vlm.prompt
    answer = ask(client, user("one"), {"role": "assistant", "content": None, "tool_calls": None}, user("two"))
    pieces = [form.question("one"), form.answer(""), form.question("two", is_first=False)]
    assert answer.choices[0].message.content == greedy(vlm, list(pieces))
    assert answer.usage.prompt_tokens == sum(len(vlm.tokenizer.encode(piece)) for piece in pieces)


def test_many_at_once_answer_as_each_alone(client, vlm: Cobra, pictures, image_urls) -> None:
    def one(number: int) -> str:
        parts = [f"question {number}"] + ([image_part(image_urls[number % 3])] if number % 4 else [])
        options: dict[str, Any] = {"max_tokens": 3 + number, "seed": number, "temperature": float(number % 2)}
        if number % 3:
            return text(client, user(*parts), **options)
        return "".join(
            chunk.choices[0].delta.content or "" for chunk in ask(client, user(*parts), stream=True, **options)
        )

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(one, range(24)))
    for number, answer in enumerate(found):
        image = pictures[number % 3] if number % 4 else None
        options: dict[str, Any] = {"seed": number, "temperature": float(number % 2)}
        assert answer == vlm.generate(image, f"question {number}", max_new_tokens=3 + number, **options)


def test_models_are_listed(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_fields_that_change_nothing_are_tolerated(client) -> None:
    """What programs send, and messages as the client itself gives them back."""
    plain = ask(client, user(ASK))
    given_back = plain.choices[0].message.model_dump()
    assert given_back["tool_calls"] is None
    harmless: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logprobs": False,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": [],
        "store": False,
        "extra_body": {"temperature": None, "stop": None, "stream": None},
    }
    again = ask(client, user(ASK), **harmless)
    assert again.choices[0].message.content == plain.choices[0].message.content
    assert ask(client, user("hi"), given_back, user(ASK)).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "5", "tool_call_id": "x"}]}, "messages[0].role"),
        ({"messages": [user("a"), CALL, user("b")]}, "messages[1]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "system", "content": None}, user("a")]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages[0]"),
        ({"messages": [{"role": "system", "content": "hi"}]}, "messages"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "messages"),
        ({"messages": [user("long " * 10_000)]}, "messages"),
        ({"messages": [user("long " * 40_000)]}, "messages"),
        ({"messages": [user("hi")] * 257}, "messages"),
        ({"messages": [user(image_part("file:///etc/passwd"))]}, "messages"),
        ({"messages": [user(image_part("data:image/png;base64,AAAA"))]}, "messages"),
        ({"messages": [user(image_part("data:image/png,AAAA"))]}, "messages"),
        ({"messages": [user(image_part("data:image/png;base64,A*A"))]}, "messages"),
        ({"messages": [user(*[image_part("data:image/png;base64,AAAA")] * 9)]}, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, user(ASK), **options)
    error = caught.value
    assert error.param == param and error.type == "invalid_request_error"
    assert len(error.body["message"]) > 10  # type: ignore[index]


def test_unknown_model_and_address_are_not_found(client) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as caught:
        ask(client, user(ASK), model="gpt-4o")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        client.embeddings.create(model="tiny", input="x")


def test_key_is_asked_for(serve) -> None:
    with serve(api_key="secret") as running:
        for key in ("wrong", "secre", "secret\u00fc"[:6] + "x"):
            with pytest.raises(openai.AuthenticationError) as caught:
                ask(running.client(api_key=key), user(ASK))
            assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            running.client(api_key="wrong").models.list()
        assert text(running.client(api_key="secret"), user(ASK))
