"""OpenAI's requests and responses as data, for batch lines and HTTP bodies alike. No files, no sockets."""
