"""Conversations: what the model has read after each turn, what a turn costs, what an interruption leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import cobra
from cobra.data.conversations import read_rows
from cobra.errors import ConfigError, DataError, NumericsError, ShapeError
from cobra.generation.chat import Chat
from cobra.generation.stopping import AnswerText
from cobra.models.state import MambaState

QUESTIONS = ["what shape is in the image?", " what color is it?\n", "is there a red shape?", "is there a circle?"]
RANDOM = {"temperature": 8.0, "seed": 3, "max_new_tokens": 20}  # bytes of any kind, so answers are long and differ


@pytest.fixture(scope="module")
def vlm(trained_run: Path) -> cobra.Cobra:
    vlm = cobra.load(trained_run, device="cpu")
    vlm.model.double()
    return vlm


@pytest.fixture
def path(small_data) -> Path:
    return small_data.image(0)


@torch.no_grad()
def read_whole(vlm: cobra.Cobra, path: Path | None, ids: list[int]) -> tuple[torch.Tensor, MambaState]:
    """The image and all tokens in one forward pass: logits after the last one, and the state."""
    embedded = [vlm.model.llm.embed(torch.tensor([ids]))]
    if path is not None:
        embedded.insert(0, vlm.model.embed_images([view[None] for view in vlm.prepare_image(path).views]))
    hidden, state = vlm.model.llm(torch.cat(embedded, dim=1))
    return vlm.model.llm.head(hidden[:, -1])[0, : vlm.model.config.llm.vocab_size], state


def rendered(vlm: cobra.Cobra, turns: list[tuple[str, str]]) -> list[int]:
    """A conversation's tokens as training makes them."""
    return [token for segment in vlm.prompt.conversation(turns) for token in vlm.tokenizer.encode(segment.text)]


def assert_equal(state: MambaState | None, other: MambaState | None) -> None:
    assert state is not None and other is not None
    for a, b in zip([*state.conv, *state.ssm], [*other.conv, *other.ssm], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of all answers from here on."""
    answers: list[list[int]] = []
    begin, add = AnswerText.__init__, AnswerText.add

    def recorded_begin(self: AnswerText, *args, **kwargs) -> None:
        begin(self, *args, **kwargs)
        answers.append([])
        self.recorded = answers[-1]  # type: ignore[attr-defined]

    def recorded_add(self: AnswerText, token: int) -> None:
        self.recorded.append(token)  # type: ignore[attr-defined]
        add(self, token)

    monkeypatch.setattr(AnswerText, "__init__", recorded_begin)
    monkeypatch.setattr(AnswerText, "add", recorded_add)
    return answers


@pytest.mark.parametrize("with_image", [True, False])
def test_state_equals_reading_the_whole_conversation(vlm: cobra.Cobra, path: Path, with_image: bool) -> None:
    source = path if with_image else None
    chat = vlm.chat(source, max_new_tokens=6)
    assert (chat.state is not None) == with_image
    for question in QUESTIONS:
        chat.ask(question)
        assert_equal(chat.state, read_whole(vlm, source, rendered(vlm, chat.history))[1])
    assert [question for question, _ in chat.history] == [question.strip() for question in QUESTIONS]
    assert all(answer for _, answer in chat.history)


def test_answers_equal_a_full_pass_for_each_token(vlm: cobra.Cobra, path: Path) -> None:
    chat, turns = vlm.chat(path, max_new_tokens=5), []
    for question in QUESTIONS:
        ids = rendered(vlm, [*turns, (question, "")])
        del ids[-len(vlm.tokenizer.encode(vlm.prompt.answer(""))) :]
        answer: list[int] = []
        while len(answer) < 5:
            token = int(read_whole(vlm, path, [*ids, *answer])[0].argmax())
            if token == vlm.tokenizer.end_id:
                break
            answer.append(token)
        turns.append((question.strip(), vlm.tokenizer.decode(answer).strip()))
        assert chat.ask(question) == turns[-1][1]
    assert chat.history == turns


def test_a_turn_costs_the_same_whatever_came_before(
    vlm: cobra.Cobra, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tokens that the language model reads."""
    llm, count = vlm.model.llm, [0]

    def counting(method: Callable, size: Callable[[torch.Tensor], int]) -> Callable:
        def call(tokens: torch.Tensor, *args, **kwargs):
            count[0] += size(tokens)
            return method(tokens, *args, **kwargs)

        return call

    monkeypatch.setattr(llm, "forward", counting(llm.forward, lambda tokens: tokens.shape[1]))
    monkeypatch.setattr(llm, "step", counting(llm.step, lambda tokens: 1))
    chat = vlm.chat(path, max_new_tokens=4, stop=[])
    assert count[0] == vlm.model.num_image_tokens
    costs = []
    for _ in range(12):
        count[0] = 0
        chat.ask("is there a red shape?")
        costs.append(count[0])
    lengths = {len(vlm.tokenizer.encode(answer)) for _, answer in chat.history}
    assert lengths == {1}  # Yes or No
    turn = len(rendered(vlm, chat.history[:2])) - len(rendered(vlm, chat.history[:1]))
    assert len(set(costs[1:])) == 1 and costs[-1] <= turn + 1  # every token once, the last one twice


def test_stream_joins_to_the_answer_and_the_history(vlm: cobra.Cobra, path: Path) -> None:
    chat, other = vlm.chat(path, **RANDOM), vlm.chat(path, **RANDOM)
    for question in QUESTIONS:
        pieces = list(chat.stream(question))
        assert "".join(pieces) == other.ask(question) == chat.history[-1][1]
        assert len(pieces) > 3 and 0 < chat.num_answer_tokens <= 20


def test_first_turn_is_what_generate_answers(vlm: cobra.Cobra, path: Path) -> None:
    for image in (path, Image.open(path), vlm.encode_image(path), None):
        assert vlm.chat(image, **RANDOM).ask(QUESTIONS[0]) == vlm.generate(image, QUESTIONS[0], **RANDOM)


def test_options_of_the_chat_and_of_a_turn(vlm: cobra.Cobra, path: Path) -> None:
    chat = vlm.chat(path, **RANDOM)
    first = chat.ask(QUESTIONS[0])
    second = chat.ask(QUESTIONS[0])
    chat.reset()
    assert chat.ask(QUESTIONS[0]) == first  # the seeds begin again
    assert chat.ask(QUESTIONS[0], seed=4) == second  # that of the second turn
    assert chat.ask(QUESTIONS[0], max_new_tokens=2) != first and chat.num_answer_tokens == 2
    stop = first[3]
    chat.reset()
    assert chat.ask(QUESTIONS[0], stop=stop) == first[: first.index(stop)].strip()


def test_repetition_penalty_looks_at_the_turn_alone(vlm: cobra.Cobra, path: Path, written: list[list[int]]) -> None:
    """Else a penalty would grow over a conversation; and its end token would be penalised from the second turn on."""
    chat, ids = vlm.chat(path, max_new_tokens=4, repetition_penalty=1e6), []
    for turn, question in enumerate(QUESTIONS):
        asked = vlm.tokenizer.encode(vlm.prompt.question(question, is_first=turn == 0))
        answer: list[int] = []
        while len(answer) < 4:
            logits, _ = read_whole(vlm, path, [*ids, *asked, *answer])
            seen = list({*asked, *answer})
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1e6, logits[seen] * 1e6)
            token = int(logits.argmax())
            if token == vlm.tokenizer.end_id:
                break
            answer.append(token)
        chat.ask(question)
        assert written[-1] == answer
        ids += [*asked, *answer, vlm.tokenizer.end_id]


def test_reset_forgets_the_turns_and_keeps_the_image(vlm: cobra.Cobra, path: Path) -> None:
    chat = vlm.chat(path, **RANDOM)
    before, first = chat.state, chat.ask(QUESTIONS[0])
    chat.ask(QUESTIONS[1])
    chat.reset()
    assert chat.history == [] and chat.state is before
    assert chat.ask(QUESTIONS[0]) == first


def whole_conversation(vlm: cobra.Cobra, chat: Chat, written: list[list[int]]) -> list[int]:
    ids: list[int] = []
    for turn, ((question, _), answer) in enumerate(zip(chat.history, written, strict=True)):
        ids += vlm.tokenizer.encode(vlm.prompt.question(question, is_first=turn == 0))
        ids += [*answer, vlm.tokenizer.end_id]
    return ids


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("how", ["closed", "collected", "asked", "interrupted"])
def test_an_interrupted_answer_ends_there(
    vlm: cobra.Cobra, path: Path, written: list[list[int]], monkeypatch: pytest.MonkeyPatch, how: str, count: int
) -> None:
    chat = vlm.chat(path, **RANDOM)
    chat.ask(QUESTIONS[0])
    stream = chat.stream(QUESTIONS[1])
    text = "".join(next(stream) for _ in range(count))
    if how == "closed":
        stream.close()
    elif how == "collected":
        del stream
        chat.state  # noqa: B018
    elif how == "interrupted":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(vlm.model.llm, "step", raising(KeyboardInterrupt()))
            next(stream)
    chat.ask(QUESTIONS[2])
    assert chat.history[1] == (QUESTIONS[1].strip(), text) and len(chat.history) == 3
    assert 0 < len(written[1]) < 20
    assert_equal(chat.state, read_whole(vlm, path, whole_conversation(vlm, chat, written))[1])


def raising(error: BaseException) -> Callable:
    def call(*_: object) -> None:
        raise error

    return call


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NumericsError("NaN")])
def test_a_turn_without_an_answer_has_never_been(
    vlm: cobra.Cobra, path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    chat = vlm.chat(path, **RANDOM)
    chat.ask(QUESTIONS[0])
    before, history = chat.state, chat.history[:]
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(AnswerText, "add", raising(error))
        chat.ask(QUESTIONS[1])
    chat.stream(QUESTIONS[1])  # never begun
    stream = chat.stream(QUESTIONS[1])
    next(stream)
    with monkeypatch.context() as patch, pytest.raises(NumericsError):
        patch.setattr(AnswerText, "add", raising(NumericsError("NaN")))
        list(stream)
    assert chat.history == history and chat.state is before


def test_an_empty_answer_is_read_as_training_renders_it(
    vlm: cobra.Cobra, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = vlm.chat(path)
    with monkeypatch.context() as patch:  # every answer ends at once
        patch.setattr(vlm.model.llm, "head", lambda hidden: one_hot(vlm, vlm.tokenizer.end_id, hidden))
        assert chat.ask(QUESTIONS[0]) == ""
    assert_equal(chat.state, read_whole(vlm, path, rendered(vlm, [(QUESTIONS[0], "")]))[1])


def one_hot(vlm: cobra.Cobra, token: int, hidden: torch.Tensor) -> torch.Tensor:
    logits = torch.zeros(*hidden.shape[:-1], vlm.model.config.llm.padded_vocab_size)
    logits[..., token] = 1
    return logits


def test_stream_leaves_the_callers_grad_mode_alone(vlm: cobra.Cobra, path: Path) -> None:
    for _ in vlm.chat(path, **RANDOM).stream(QUESTIONS[0]):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_transcripts(vlm: cobra.Cobra, path: Path, tmp_path: Path) -> None:
    chat = vlm.chat(path, max_new_tokens=5)
    for question in QUESTIONS[:2]:
        chat.ask(question)
    text = chat.save(tmp_path / "folder" / "chat.md").read_text()
    assert str(path) in text and all(part in text for turn in chat.history for part in turn)
    row = json.loads(chat.save(tmp_path / "chat.json").read_text())[0]
    assert row["image"] == str(path)
    (tmp_path / "row.json").write_text(json.dumps([row | {"image": path.name}]))
    (read,) = read_rows(tmp_path / "row.json")  # what training would read
    assert read.image == path.name and rendered(vlm, list(read.turns)) == rendered(vlm, chat.history)
    alone = vlm.chat()
    alone.ask("hi")
    assert "image" not in json.loads(alone.save(tmp_path / "chat.json").read_text())[0]
    with pytest.raises(ConfigError, match=r"chat\.txt must end in \.md .* or \.json"):
        chat.save(tmp_path / "chat.txt")
    with pytest.raises(DataError, match=r"Cannot write the transcript .*below\.md: "):
        chat.save(tmp_path / "chat.json" / "below.md")


@pytest.mark.parametrize("text", ["", " \n", "<image>", None, 3, ["a"]])
def test_questions_need_text(vlm: cobra.Cobra, text: object) -> None:
    with pytest.raises(ConfigError, match="is empty; a turn of a chat needs some text"):
        vlm.chat().stream(text)  # type: ignore[arg-type]


def test_other_errors_come_at_once(vlm: cobra.Cobra, path: Path) -> None:
    for wrong in ({"temperature": -1}, {"max_new_tokens": 0}, {"stop": ""}, {"seed": [1, 2]}, {"top_p": math.nan}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            vlm.chat(path, **wrong)
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            vlm.chat(path).stream("hi", **wrong)
    with pytest.raises(DataError, match=r"absent\.png"):
        vlm.chat("absent.png")
    with pytest.raises(DataError, match="not int"):
        vlm.chat(3)  # type: ignore[arg-type]
    states = vlm.encode_image([path, path])
    for several in ([path, path], states):
        with pytest.raises(ShapeError, match="A chat is about one image, and these are 2"):
            vlm.chat(several)  # type: ignore[arg-type]
