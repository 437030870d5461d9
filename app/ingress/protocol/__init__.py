"""Request bodies as pydantic models: what is accepted is implemented, anything else is an error that names it."""

from app.ingress.protocol.chat import ChatCompletionRequest, ChatTemplateFields
from app.ingress.protocol.completions import CompletionRequest
from app.ingress.protocol.sampling import SamplingFields
from app.ingress.protocol.tokens import DetokenizeRequest, TokenizeMessages, TokenizePrompt

__all__ = [
    "ChatCompletionRequest",
    "ChatTemplateFields",
    "CompletionRequest",
    "DetokenizeRequest",
    "SamplingFields",
    "TokenizeMessages",
    "TokenizePrompt",
]
