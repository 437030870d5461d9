"""The HTTP deployment: OpenAI routes over model clients."""
