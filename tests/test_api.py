"""`cobra.load` and what it returns: generate, stream, score, encode_image."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cobra
from cobra.errors import CheckpointError, ConfigError, DataError, ShapeError
from cobra.models.quantized import is_quantized
from cobra.models.vlm import CobraVLM
from cobra.models.weights import save_model_folder
from cobra.runtime import pick_device
from cobra.text.tokenizer import Tokenizer

PROMPT = "what color is the circle?"


@pytest.fixture(scope="module")
def vlm(trained_run: Path) -> cobra.Cobra:
    return cobra.load(trained_run, device="cpu")


@pytest.fixture
def paths(small_data) -> list[Path]:
    return [small_data.image(n) for n in range(4)]


@pytest.fixture
def server(small_data) -> Iterator[str]:
    """A web server on this machine that serves the images; its address."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=small_data.images))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def generate(vlm: cobra.Cobra, image, prompt=PROMPT, **options) -> str | list[str]:
    return vlm.generate(image, prompt, max_new_tokens=12, **options)


def test_answers_depend_on_the_image(vlm: cobra.Cobra, paths: list[Path]) -> None:
    """Else most tests below would compare nothing."""
    assert len({*generate(vlm, paths), *generate(vlm, paths, "what shape is in the image?")}) > 2
    assert generate(vlm, paths[0]) != ""


def test_every_kind_of_image_gives_the_same_answer(vlm: cobra.Cobra, paths: list[Path], server: str) -> None:
    expected = generate(vlm, paths[0])
    image = Image.open(paths[0])
    for kind in (str(paths[0]), image, np.asarray(image), f"{server}/0.png", vlm.encode_image(paths[0])):
        assert generate(vlm, kind) == expected


def test_lists_in_lists_out(vlm: cobra.Cobra, paths: list[Path]) -> None:
    questions = [
        PROMPT,
        "what shape is in the image?",
        "is there a red shape?",
        "is there a circle shape in the image?",
    ]
    one_by_one = [generate(vlm, path, question) for path, question in zip(paths, questions, strict=True)]
    assert generate(vlm, paths, questions) == one_by_one
    assert generate(vlm, paths[0], questions) == [generate(vlm, paths[0], question) for question in questions]
    assert generate(vlm, paths) == [generate(vlm, path) for path in paths]
    assert generate(vlm, paths[:1], questions[:1]) == one_by_one[:1]
    assert generate(vlm, paths[:1]) == [generate(vlm, paths[0])]


def test_text_alone_is_answered(vlm: cobra.Cobra) -> None:
    assert isinstance(generate(vlm, None), str)
    assert generate(vlm, None, [PROMPT, "hi"]) == [generate(vlm, None), generate(vlm, None, "hi")]


def test_state_stands_in_for_images(vlm: cobra.Cobra, paths: list[Path]) -> None:
    states = vlm.encode_image(paths)
    assert len(states) == 4
    assert generate(vlm, states) == generate(vlm, paths)
    assert generate(vlm, states[2]) == generate(vlm, paths[2])
    assert generate(vlm, states[[3, 3, 0]]) == [generate(vlm, paths[n]) for n in (3, 3, 0)]
    assert generate(vlm, [states[1], states[2]]) == generate(vlm, paths[1:3])
    assert generate(vlm, states) == generate(vlm, paths)  # using a state does not use it up


def test_greedy_tokens_equal_a_full_pass_each(vlm: cobra.Cobra, paths: list[Path]) -> None:
    """Without any state: the whole sequence again for every token."""
    ids = vlm.tokenizer.encode(vlm.prompt.question(PROMPT))
    pixels = [view[None] for view in vlm.model.vision.transform(Image.open(paths[0]))]
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < 12:
            token = int(vlm.model(torch.tensor([ids + answer]), pixels=pixels).logits[0, -1].argmax())
            if token == vlm.tokenizer.end_id:
                break
            answer.append(token)
    assert generate(vlm, paths[0]) == vlm.tokenizer.decode(answer).strip()


@pytest.mark.parametrize("temperature", [0.0, 8.0])  # 8: random bytes, cut and invalid characters among them
def test_stream_pieces_join_to_the_generated_text(vlm: cobra.Cobra, paths: list[Path], temperature: float) -> None:
    for seed in range(4):
        options = {"temperature": temperature, "seed": seed, "max_new_tokens": 30}
        pieces = list(vlm.stream(paths[0], PROMPT, **options))
        assert "".join(pieces) == vlm.generate(paths[0], PROMPT, **options)
        assert all(pieces) and (temperature == 0 or len(pieces) > 5)


def test_stream_leaves_the_callers_grad_mode_alone(vlm: cobra.Cobra, paths: list[Path]) -> None:
    for _ in vlm.stream(paths[0], PROMPT, max_new_tokens=3):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_sampling_is_seeded(vlm: cobra.Cobra, paths: list[Path]) -> None:
    def draw(seed: int, **options: float) -> str | list[str]:
        return generate(vlm, paths[0], temperature=8.0, seed=seed, **options)

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(5)}) > 1
    assert {draw(seed, top_p=1e-6) for seed in range(3)} == {generate(vlm, paths[0])}  # the likeliest token alone


def test_each_answer_has_its_own_seed(vlm: cobra.Cobra, paths: list[Path]) -> None:
    options = {"temperature": 8.0, "top_k": 50, "min_p": 1e-3, "repetition_penalty": 1.1}
    answers = generate(vlm, paths, seed=3, **options)
    assert answers == [generate(vlm, path, seed=3 + row, **options) for row, path in enumerate(paths)]
    assert generate(vlm, paths, seed=[4, 4, 5, 3], **options)[1] == answers[1]
    assert len({*generate(vlm, [paths[0]] * 4, seed=[1, 2, 1, 2], **options)}) == 2


@pytest.mark.parametrize(
    "option",
    [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}, {"temperature": 1e-9}],
    ids=lambda option: next(iter(option)),
)
def test_strictest_options_are_greedy(vlm: cobra.Cobra, paths: list[Path], option: dict[str, float]) -> None:
    assert generate(vlm, paths, **{"temperature": 8.0} | option) == generate(vlm, paths)


def test_repetition_penalty_changes_greedy_answers(vlm: cobra.Cobra, paths: list[Path]) -> None:
    """Below 1 it rewards: the answers take up tokens of the prompt, which they do not hold otherwise."""
    assert generate(vlm, paths, repetition_penalty=0.01) != generate(vlm, paths)


def test_stop_strings_end_answers(vlm: cobra.Cobra, paths: list[Path]) -> None:
    """Random text, so that a stop string can be cut out of its middle wherever the tokens end."""
    options = {"temperature": 8.0, "max_new_tokens": 30}
    wholes = vlm.generate(paths, PROMPT, **options)
    for start in range(0, 12, 3):
        stops = [whole[start : start + 4].strip() for whole in wholes]
        assert all(stops)
        expected = [whole[: min(whole.find(s) for s in stops if s in whole)].strip() for whole in wholes]
        assert vlm.generate(paths, PROMPT, stop=stops, **options) == expected
        for row, path in enumerate(paths):
            pieces = list(vlm.stream(path, PROMPT, stop=stops, seed=row, **options))
            assert "".join(pieces) == expected[row] and all(pieces)
    assert vlm.generate(paths[0], PROMPT, stop="never so", **options) == wholes[0]


def test_stream_gives_one_answer(vlm: cobra.Cobra, paths: list[Path]) -> None:
    with pytest.raises(ShapeError, match="asks for 2; use generate"):
        vlm.stream(vlm.encode_image(paths[:2]), PROMPT)


def test_options_are_checked_at_once(vlm: cobra.Cobra) -> None:
    """Before the image is read, and in `stream` before the first piece is asked for."""
    for call in (vlm.generate, vlm.stream):
        for options, error, message in (
            ({"min_p": 2}, ConfigError, "min_p=2"),
            ({"stop": ""}, ConfigError, "stop=''"),
            ({"temprature": 1.0}, ConfigError, "temprature"),
        ):
            with pytest.raises(error, match=message):
                call("absent.png", PROMPT, **options)
        with pytest.raises(ConfigError, match="max_new_tokens=0"):
            call(None, PROMPT, max_new_tokens=0)


def test_scores_are_a_softmax_over_the_choices(vlm: cobra.Cobra, paths: list[Path]) -> None:
    choices = ["Yes", "No", "circle"]
    scores = vlm.score(paths, PROMPT, choices)
    assert np.shape(scores) == (4, 3)
    assert [sum(row) for row in scores] == pytest.approx([1] * 4, abs=1e-6)
    ids = torch.tensor([vlm.tokenizer.encode(vlm.prompt.question(PROMPT))])
    columns = [vlm.tokenizer.encode(choice)[0] for choice in choices]
    for path, row in zip(paths, scores, strict=True):
        pixels = [view[None] for view in vlm.model.vision.transform(Image.open(path))]
        with torch.no_grad():
            logits = vlm.model(ids, pixels=pixels).logits[0, -1, columns].double().numpy()
        expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        np.testing.assert_allclose(row, expected, rtol=1e-4)  # float32 logits of one pass against prefix and prompt
        assert vlm.score(path, PROMPT, choices) == pytest.approx(row, rel=1e-4)


def test_bfloat16_answers(trained_run: Path, paths: list[Path], vlm: cobra.Cobra) -> None:
    half = cobra.load(trained_run, device="cpu", dtype="bfloat16")
    assert half.score(paths[0], PROMPT, ["Yes", "No"]) == pytest.approx(
        vlm.score(paths[0], PROMPT, ["Yes", "No"]), abs=0.1
    )
    assert isinstance(generate(half, paths[0]), str)


def test_wrong_use_is_refused(vlm: cobra.Cobra, paths: list[Path], server: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    for error, message, call in (
        (ShapeError, "4 images and 2 prompts", lambda: generate(vlm, paths, ["a", "b"])),
        (ShapeError, "images is empty", lambda: generate(vlm, [])),
        (ShapeError, "prompts is empty", lambda: generate(vlm, paths[0], [])),
        (DataError, "absent.png", lambda: generate(vlm, "absent.png")),
        (DataError, "does not decode", lambda: generate(vlm, tmp_path / "text.png")),
        (DataError, "/absent.png", lambda: generate(vlm, f"{server}/absent.png")),
        (DataError, "float64", lambda: generate(vlm, np.zeros((4, 4, 3)))),
        (DataError, "uint8", lambda: generate(vlm, np.zeros(4, np.uint8))),
        (DataError, r"\(4, 4, 5\)", lambda: generate(vlm, np.zeros((4, 4, 5), np.uint8))),
        (DataError, "int", lambda: generate(vlm, 7)),
        (DataError, r"'a\\x00b' is not the path of an image", lambda: generate(vlm, "a\0b")),
        (DataError, "http://\\[: Invalid", lambda: generate(vlm, "http://[")),
        (DataError, "~no-such-user/a.png", lambda: generate(vlm, "~no-such-user/a.png")),
        (ConfigError, "single tokens", lambda: vlm.score(paths[0], PROMPT, ["Perhaps"])),
        (ConfigError, "a list of choices", lambda: vlm.score(paths[0], PROMPT, "Yes")),
        (ConfigError, "temperature=-1", lambda: generate(vlm, paths[0], temperature=-1)),
        (ConfigError, "top_p=0", lambda: generate(vlm, paths[0], top_p=0)),
        (ConfigError, "seed holds 3", lambda: generate(vlm, paths, seed=[1, 2, 3])),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_grey_arrays_are_images(vlm: cobra.Cobra) -> None:
    array = np.arange(0, 256, 4, np.uint8)[None].repeat(64, axis=0)
    expected = generate(vlm, np.stack([array] * 3, axis=2))
    assert generate(vlm, array) == generate(vlm, array[:, :, None]) == expected


def test_load_says_what_is_wrong(tmp_path: Path, trained_run: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name, message in (
        ("absent", "no run or model folder"),
        ("run", "has not finished"),
        ("other", "neither a run"),
    ):
        with pytest.raises(CheckpointError, match=message):
            cobra.load(tmp_path / name)
    with pytest.raises(ConfigError, match="float16"):
        cobra.load(trained_run, dtype="float16")
    assert cobra.load(trained_run / "model", device="cpu").name == "tiny"  # the model folder alone will do


@pytest.mark.parametrize("name", [None, "", " ", 7, b"run", "a\0b"])
def test_names_that_are_none_are_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="names no model"):
        cobra.load(name)


@pytest.mark.parametrize("name", ["x" * 5000, "~no-such-user/run"])
def test_paths_that_cannot_be_looked_at_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a path that can be read"):
        cobra.load(name)


@pytest.mark.parametrize("device", ["meta", "cpu:7", "cuda:-1", "vulkan", "gpu", "", None, 7])
def test_devices_that_do_not_compute_are_refused(trained_run: Path, device: Any) -> None:
    with pytest.raises(ConfigError, match=f"device='{device}' is not a device to compute on; use auto"):
        cobra.load(trained_run, device=device)


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    with pytest.raises(ConfigError, match=r"'cuda:2', but torch sees only 2 CUDA devices here; use cuda:1 or less"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no CUDA device"):
        pick_device("cuda:0")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/", "/ is the current folder or around it"),
        (".", "current folder"),
        ("..", "current folder"),
        ("absent/..", "current folder"),
        ("file/x/y", "file is a file; choose another place"),
        ("a\0b", "is not a folder that can be written"),
    ],
)
def test_models_are_not_written_just_anywhere(
    vlm: cobra.Cobra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("file").write_text("mine")
    with pytest.raises(CheckpointError, match=message):
        vlm.save_pretrained(place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "here"]


def test_choices_need_a_tokenizer_that_has_them(
    small_model: CobraVLM, tokenizer: Tokenizer, paths: list[Path], tmp_path: Path
) -> None:
    """A vocabulary that splits "Yes" still answers freely; `score` is where it is refused, before an image is read."""
    content = json.loads(tokenizer.file.read_text())
    content["model"]["vocab"]["Yea"] = content["model"]["vocab"].pop("Yes")
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != "Yes"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    save_model_folder(small_model, tmp_path / "tokenizer.json", tmp_path / "model")
    vlm = cobra.load(tmp_path / "model", device="cpu")
    assert isinstance(generate(vlm, paths[0]), str)
    with pytest.raises(ConfigError, match=r"'Yes' is 2 tokens in tokenizer\.json; choices must be single tokens"):
        vlm.score("absent.png", PROMPT, ["Yes", "No"])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantised_models_answer_as_the_plain_one(
    vlm: cobra.Cobra, trained_run: Path, paths: list[Path], tmp_path: Path, name: str
) -> None:
    quantised = cobra.load(trained_run, device="cpu", quantize=name)
    assert is_quantized(quantised.model.llm) and not is_quantized(quantised.model.vision)
    questions = [
        PROMPT,
        "what shape is in the image?",
        "is there a red shape?",
        "is there a circle shape in the image?",
    ]
    pairs = [(path, question) for path in paths for question in questions]
    images, prompts = [path for path, _ in pairs], [question for _, question in pairs]
    answers, expected = generate(quantised, images, prompts), generate(vlm, images, prompts)
    equal = sum(a == b for a, b in zip(answers, expected, strict=True))
    assert equal >= (len(pairs) - 1 if name == "int8" else len(pairs) // 2)
    assert answers == [generate(quantised, path, question) for path, question in pairs]
    assert "".join(quantised.stream(paths[0], PROMPT, max_new_tokens=12)) == answers[0]
    assert sum(quantised.score(paths[0], PROMPT, ["Yes", "No"])) == pytest.approx(1)
    with pytest.raises(ConfigError, match="A quantised model cannot be saved"):
        quantised.save_pretrained(tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_unknown_quantisation_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="quantize='int2' is not known; choose one of int8, int4"):
        cobra.load("absent", quantize="int2")


def test_another_tokenizer_is_refused(
    small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path, assets: Path
) -> None:
    """One of too few entries gives answers of noise, one of too many cannot be embedded."""
    save_model_folder(small_model, tokenizer.file, tmp_path / "model")
    content = json.loads(tokenizer.file.read_text())
    content["model"]["vocab"] = {key: i for key, i in content["model"]["vocab"].items() if i < 257}
    content["model"]["merges"] = []
    (tmp_path / "bytes.json").write_text(json.dumps(content))
    for file, message in (
        (tmp_path / "bytes.json", r"vocabulary of 368 is far more than the tokenizer's 257 entries in .*bytes\.json"),
        (assets / "data" / "gpt-neox-tokenizer" / "tokenizer.json", "368 is less than the tokenizer's 50277"),
    ):
        with pytest.raises(ConfigError, match=rf"{message}.*llm=\{{'tokenizer'"):
            cobra.load(tmp_path / "model", device="cpu", llm={"tokenizer": str(file)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens=nan"),
        ({"max_new_tokens": "5"}, "max_new_tokens='5'"),
        ({"top_k": 2**70}, "top_k="),
        ({"beams": 4}, "beams is no option of an answer; choose among max_new_tokens"),
    ],
)
def test_odd_options_are_refused(vlm: cobra.Cobra, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        vlm.generate(None, PROMPT, **options)


def test_numpys_whole_numbers_are_numbers(vlm: cobra.Cobra, paths: list[Path]) -> None:
    plain = vlm.generate(paths[0], PROMPT, temperature=2.0, seed=3, top_k=5)
    assert vlm.generate(paths[0], PROMPT, temperature=2.0, seed=np.int64(3), top_k=np.int32(5)) == plain
    assert vlm.generate(paths[0], [PROMPT], temperature=2.0, seed=[np.int64(3)], top_k=5) == [plain]


@pytest.mark.parametrize("prompt", [None, 5, [5], [None], b"what?", "half a pair: \ud800"])
def test_prompts_that_are_no_text_are_refused(vlm: cobra.Cobra, prompt: Any) -> None:
    with pytest.raises(ConfigError, match=r"A prompt is text|no character"):
        vlm.generate(None, prompt)


def test_what_a_prompt_shows_is_one_line(vlm: cobra.Cobra, paths: list[Path]) -> None:
    states = vlm.encode_image(paths[:2])
    assert repr(states).startswith("ImageState(2 images, MambaState(rows=2, layers=") and len(repr(states)) < 100
    assert f"{sum(p.numel() for p in vlm.model.parameters()):,} parameters on cpu" in repr(vlm)
