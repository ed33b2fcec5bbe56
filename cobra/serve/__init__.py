"""An HTTP server with OpenAI's chat interface; needs the extra `serve`, and only `scripts/serve.py` imports it."""
