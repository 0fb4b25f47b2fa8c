"""The HTTP API: OpenAI and Ollama routes over one engine process."""
