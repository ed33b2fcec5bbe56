"""An exported model in a process that cannot import Cobra: its own code, the same greedy tokens; and on a Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

import cobra
from cobra.api import Cobra
from cobra.generation.engine import decode
from cobra.generation.sampling import Sampling

pytest.importorskip("transformers")

QUESTIONS = ["what shape is in the image?", "is there a red shape?", "what color is the circle?", "a", "is it?", ""]
MAX_NEW_TOKENS = 12
COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """A Hub with one repository: takes commits, gives files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(f"POST {self.path}")
        if self.path.endswith("/repos/create"):
            self._answer({"url": f"http://{self.headers['Host']}/me/mine", "name": "me/mine"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._answer({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.server.commits.append(value["summary"])
                elif line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['Host']}/me/mine/commit/{COMMIT}"
            self._answer({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self._answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        if self.path.startswith("/api/models/me/mine") and "/tree/" not in self.path:
            siblings = [{"rfilename": file} for file in self.server.files]
            self._answer({"id": "me/mine", "sha": COMMIT, "siblings": siblings})
        elif name in self.server.files:
            content = self.server.files[name]
            self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _answer(self, content: dict[str, Any]) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@torch.inference_mode()
def our_ids(vlm: Cobra, pictures: list[str]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in QUESTIONS]
    steps = decode(
        vlm.model.llm,
        [vlm.tokenizer.encode(vlm.prompt.question(question)) for question in QUESTIONS],
        vlm.encode_image(pictures).state,
        max_new_tokens=MAX_NEW_TOKENS,
        end_id=vlm.tokenizer.end_id,
        sampling=Sampling(),
    )
    for step in steps:
        for row, token in step:
            found[row].append(token)
    return found


def test_same_tokens_without_cobra_and_from_a_hub(
    trained_run: Path, small_data: Any, tmp_path: Path, hub: Hub, script: Any
) -> None:
    done = script("convert", str(trained_run), "exported", "--to", "hf")
    assert done.returncode == 0, done.stderr
    vlm = cobra.load(trained_run, device="cpu")
    pictures = [str(small_data.image(number)) for number in range(len(QUESTIONS))]
    task = {
        "folder": str(tmp_path / "exported"),
        "images": pictures,
        "questions": QUESTIONS,
        "raw_prompt": vlm.prompt.question(QUESTIONS[0]),
        "max_new_tokens": MAX_NEW_TOKENS,
        "repository": "me/mine",
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hf_alone.py")), str(tmp_path / "task.json")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    answers = json.loads(child.stdout.splitlines()[-1])
    assert answers["modules"] == [] and answers["home"] == "transformers_modules"
    expected = our_ids(vlm, pictures)
    assert len({tuple(ids) for ids in expected}) > 2  # else equal tokens would say little
    end = vlm.tokenizer.end_id
    padded = [(ids + [end] * MAX_NEW_TOKENS)[: len(answers["ids"][0])] for ids in expected]
    assert answers["ids"] == answers["uncached"] == answers["pushed"] == padded
    answered = vlm.generate(pictures, QUESTIONS, max_new_tokens=MAX_NEW_TOKENS)
    assert [text.strip() for text in answers["pipeline"]] == answered
    assert answers["beams"]
    assert {*hub.files} >= {"config.json", "model.safetensors", "modeling_cobra.py", "processing_cobra.py"}
    assert hub.commits == ["Upload CobraMambaForConditionalGeneration", "Upload processor"]
