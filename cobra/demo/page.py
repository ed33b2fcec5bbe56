"""The page itself: what stands where, and what each button does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cobra.api import Cobra, load
from cobra.config import DemoConfig
from cobra.demo.pictures import draw_box, examples
from cobra.demo.session import Asker, Visit
from cobra.errors import CobraError, ConfigError
from cobra.ops import use_backend
from cobra.runtime import require

if TYPE_CHECKING:
    import gradio as gr

MAX_WAITING = 64  # visitors' questions
AT_ONCE = 8  # answers that are made in turns
SESSION_SECONDS = 3600  # after which a visit without a question is forgotten
CSS = """
.gradio-container > main {max-width: 1200px; width: 100% !important; margin: auto}
.speed {font-size: 85%; opacity: 0.7; min-height: 1.5em}
footer {display: none !important}
"""


def serve(config: DemoConfig) -> None:
    """Load a model and serve its page until Ctrl-C.

    Raises:
        CobraError: gradio is not installed, or the model is missing or broken.
    """
    require("The demo", "gradio", extra="demo")  # before a model is loaded for nothing
    with use_backend(config.ops):
        vlm = load(config.load, **config.load_options)
        launch(build(vlm, config), config)


def launch(page: gr.Blocks, config: DemoConfig, *, wait: bool = True) -> str:
    """Serve a page; return its address, at once with `wait=False`, else after Ctrl-C.

    Raises:
        ConfigError: the port is taken.
    """
    from gradio.themes import Soft

    try:
        _, address, _ = page.launch(
            server_name=config.host,
            server_port=config.port,
            share=config.share,
            max_file_size=f"{config.max_image_mb}mb",
            theme=Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=CSS,
            ssr_mode=False,
            prevent_thread_lock=not wait,
        )
    except OSError as error:
        raise ConfigError(f"host={config.host} port={config.port}: {error}; choose another port.") from None
    return address


def build(vlm: Cobra, config: DemoConfig) -> gr.Blocks:
    """Build the page for a model."""
    import gradio as gr

    asker = Asker(vlm, config.prompts, config.max_new_tokens)
    with gr.Blocks(title=f"Cobra: {vlm.name}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        visit = gr.State(Visit(), time_to_live=SESSION_SECONDS)
        gr.Markdown(f"# Cobra\nA Mamba vision-language model: **{vlm.name}**. It can be wrong about any image.")
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(
                    label="Image", type="pil", image_mode=None, sources=["upload", "clipboard"], height=340
                )
                _read_uploads_only(image)
                gr.Examples([[one] for one in examples()], image, label="Examples", elem_id="examples")
                with gr.Accordion("Settings", open=False):
                    temperature = gr.Slider(
                        0, 2, config.temperature, step=0.05, label="Temperature", info="0: the likeliest word"
                    )
                    limit = gr.Slider(
                        1, config.max_new_tokens, config.max_new_tokens, step=1, label="Tokens of an answer at most"
                    )
            with gr.Column(scale=3), gr.Tabs():
                tabs = _Tabs(asker, visit, image, [temperature, limit])
                tabs.chat()
                tabs.short()
                tabs.judge()
                tabs.find()
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=AT_ONCE)


class _Tabs:
    """The right side of the page; each method adds a tab."""

    def __init__(self, asker: Asker, visit: gr.State, image: gr.Image, settings: list[Any]) -> None:
        self._asker = asker
        self._shown = [visit, image]
        self._image = image
        self._settings = settings

    def chat(self) -> None:
        import gradio as gr

        with gr.Tab("Chat"):
            chatbot = gr.Chatbot(show_label=False, height=430, placeholder="Ask about the image.", buttons=[])
            with gr.Row():
                question = _question("Ask about the image, or anything")
                send = gr.Button("Send", variant="primary", scale=1, min_width=80)
                stop = gr.Button("Stop", scale=1, min_width=80)
                reset = gr.Button("Reset", scale=1, min_width=80)
            speed = gr.Markdown(elem_classes="speed")

        def answer(visit: Visit, image: Image.Image | None, text: str, *settings: Any) -> Iterator[Any]:
            typed: Any = ""  # taken away once: what is typed during an answer stays
            try:
                for turns, rate in self._asker.stream(visit, image, text, *settings):
                    yield _messages(turns), typed, rate
                    typed = gr.skip()
            except CobraError as error:
                yield _say(error)

        def forget(visit: Visit) -> tuple[list[Any], str]:
            visit.chat = None
            return [], ""

        asking = gr.on(
            [send.click, question.submit],
            answer,
            [*self._shown, question, *self._settings],
            [chatbot, question, speed],
            trigger_mode="once",
            api_name="chat",
        )
        stop.click(None, cancels=[asking])
        for event in (reset.click, chatbot.clear, self._image.change):
            event(forget, self._shown[0], [chatbot, speed], cancels=[asking], api_visibility="private")

    def short(self) -> None:
        import gradio as gr

        with gr.Tab("Short answer"):
            question = _question("A question for a word or two")
            ask = gr.Button("Ask", variant="primary")
            answer = gr.Textbox(label="Answer", interactive=False)
            speed = gr.Markdown(elem_classes="speed")
            _asked_as(self._asker.prompts.short)

        def run(*values: Any) -> tuple[str, str]:
            try:
                return self._asker.short(*values)
            except CobraError as error:
                return _say(error)

        gr.on(
            [ask.click, question.submit],
            run,
            [*self._shown, question, *self._settings],
            [answer, speed],
            api_name="short",
        )

    def judge(self) -> None:
        import gradio as gr

        words = self._asker.words()
        if not words:
            return
        with gr.Tab("True or false"):
            statement = _question("A statement, or a question for yes or no")
            pair = gr.Radio(words, value=words[0], show_label=False, container=False)
            ask = gr.Button("Judge", variant="primary")
            bars = gr.Label(label="Probability", show_heading=False)
            _asked_as(self._asker.prompts.judge)

        def run(*values: Any) -> dict[str, float]:
            try:
                return self._asker.judge(*values)
            except CobraError as error:
                return _say(error)

        gr.on([ask.click, statement.submit], run, [*self._shown, statement, pair], bars, api_name="judge")

    def find(self) -> None:
        import gradio as gr

        with gr.Tab("Find"):
            phrase = _question("What to find: a phrase")
            ask = gr.Button("Find", variant="primary")
            result = gr.Image(label="Box", interactive=False, height=340, buttons=["fullscreen"], elem_id="box")
            said = gr.Textbox(label="The model wrote", interactive=False)
            speed = gr.Markdown(elem_classes="speed")
            _asked_as(self._asker.prompts.box)

        def run(visit: Visit, image: Image.Image | None, *values: Any) -> tuple[Image.Image | None, str, str]:
            try:
                box, text, rate = self._asker.find(visit, image, *values)
            except CobraError as error:
                return _say(error)
            if box is None or image is None:
                return image, f"{text}  (this is no box)", rate
            return draw_box(image, box), text, rate

        gr.on(
            [ask.click, phrase.submit],
            run,
            [*self._shown, phrase, *self._settings],
            [result, said, speed],
            api_name="find",
        )


def _read_uploads_only(image: gr.Image) -> None:
    """Check where a file lies before it is opened: Gradio does so only if a client's message says that it is one."""
    import gradio as gr

    preprocess = image.preprocess
    uploads = Path(image.GRADIO_CACHE).resolve()

    def checked(payload: Any) -> Any:
        is_inline = payload is not None and (payload.url or "").startswith("data:")
        if payload is not None and not is_inline and not Path(payload.path or "").resolve().is_relative_to(uploads):
            raise gr.Error("Only uploaded images are read.", print_exception=False)
        return preprocess(payload)

    image.preprocess = checked  # not a subclass, which Gradio takes for a component with a front end of its own


def _question(placeholder: str) -> gr.Textbox:
    import gradio as gr

    return gr.Textbox(
        placeholder=placeholder, show_label=False, container=False, lines=1, max_lines=4, scale=6, autofocus=True
    )


def _asked_as(prompt: str) -> None:
    import gradio as gr

    gr.Markdown(f"The model is asked: `{prompt.replace(chr(10), ' ⏎ ')}`", elem_classes="speed")


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for question, answer in turns
        for role, text in (("user", question), ("assistant", answer or "…"))
    ]


def _say(error: CobraError) -> Any:
    """Show an error above the page, which stays as it is: Gradio's own errors would cover the conversation."""
    import gradio as gr

    gr.Warning(str(error))
    return gr.skip()
