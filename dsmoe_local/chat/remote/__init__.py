"""Models on a server with OpenAI's API, in place of an engine. Leaves what is said and shown to the chat."""
