"""An HTTP server with OpenAI's API over the engine. Leaves the form of requests and replies to `protocol`."""
