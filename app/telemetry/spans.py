"""The spans of a request, and the names of what they say.

    POST /v1/chat/completions          the ingress: from the request's arrival to the end of its answer
    ├─ receive                         body read and checked
    ├─ tokenize                        chat template, and text to tokens
    ├─ attempt                         one submission to a replica; another one if that replica is lost, fails or drains
    │  ├─ balancer queue               from its booking until it is sent on its way: held back or not
    │  ├─ route                        from the Serve call until the request router has sent it to a replica
    │  └─ engine                       the replica: from the call's arrival to the request's last token there
    │     ├─ engine queue              until its first step
    │     ├─ prefill                   one for each chunk of the prompt, or of what is computed again
    │     ├─ decode                    while it draws tokens
    │     └─ preempted                 from the loss of its KV blocks to the step that goes on
    └─ detokenize                      from the first token's arrival at the ingress to the last one's text

The conventions for generative AI (github.com/open-telemetry/semantic-conventions-genai, at 1.44.0 of the others) name
what they have a name for; the rest is `quire.`.
"""

from __future__ import annotations

from typing import Final

RECEIVE: Final = "receive"
TOKENIZE: Final = "tokenize"
ATTEMPT: Final = "attempt"
BALANCER_QUEUE: Final = "balancer queue"
ROUTE: Final = "route"
ENGINE: Final = "engine"
ENGINE_QUEUE: Final = "engine queue"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
PREEMPTED: Final = "preempted"
DETOKENIZE: Final = "detokenize"

# HTTP
REQUEST_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
STATUS_CODE: Final = "http.response.status_code"
URL_PATH: Final = "url.path"
URL_SCHEME: Final = "url.scheme"
ERROR_TYPE: Final = "error.type"

# Generative AI
OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_CHOICES: Final = "gen_ai.request.choice.count"
REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_STREAM: Final = "gen_ai.request.stream"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_K: Final = "gen_ai.request.top_k"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
INPUT_MESSAGES: Final = "gen_ai.input.messages"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"

# Quire's own; seconds and tokens
REQUEST_ID: Final = "quire.request.id"
ENGINE_REQUEST_ID: Final = "quire.engine_request.id"
REPLICA: Final = "quire.replica.id"
ATTEMPT_NUMBER: Final = "quire.attempt.number"
OUTCOME: Final = "quire.balancer.outcome"
PREDICTED_COST: Final = "quire.balancer.predicted_cost_s"
PREDICTED_WAIT: Final = "quire.balancer.predicted_wait_s"
PREDICTED_PREFILL: Final = "quire.balancer.predicted_prefill_s"
PREDICTED_ADAPTER: Final = "quire.balancer.predicted_adapter_s"
NUM_CANDIDATES: Final = "quire.balancer.candidates"
EXPECTED_CACHED_TOKENS: Final = "quire.balancer.expected_cached_tokens"
NUM_REFUSALS: Final = "quire.route.refusals"
RESUMED_TOKENS: Final = "quire.engine.resumed_tokens"
TIME_TO_FIRST_TOKEN: Final = "quire.engine.time_to_first_token_s"
NUM_PREEMPTIONS: Final = "quire.engine.preemptions"
PREEMPTION_KIND: Final = "quire.preemption.kind"
CHUNK_TOKENS: Final = "quire.prefill.tokens"
BUSY_TIME: Final = "quire.detokenize.busy_s"
