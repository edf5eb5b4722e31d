"""Usage objects as providers and their users published them, or as real servers sent them, each with where it is from.

Where only a layout was found, the comment says that the numbers are made up.
"""

from __future__ import annotations

from typing import Any

Body = dict[str, Any]

ANTHROPIC_5M_1H = {  # platform.claude.com/docs/en/build-with-claude/prompt-caching, "1-hour cache duration"
    "input_tokens": 2048,
    "cache_read_input_tokens": 1800,
    "cache_creation_input_tokens": 248,
    "output_tokens": 503,
    "cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 100},
}
ANTHROPIC_1H = {  # BerriAI/litellm issue 20293, a body of Haiku 4.5; its output was not shown
    "input_tokens": 3,
    "cache_creation_input_tokens": 5424,
    "cache_read_input_tokens": 0,
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 5424},
    "output_tokens": 40,
    "output_tokens_details": {"thinking_tokens": 12},
}
VLLM_MESSAGES = {  # vLLM 0.32.0, run for this project, as are the next two
    "input_tokens": 4,
    "output_tokens": 6,
    "cache_creation_input_tokens": 32,
    "cache_read_input_tokens": 1952,
}
VLLM_CHAT = {
    "prompt_tokens": 1987,
    "total_tokens": 1992,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1952, "created_cache_tokens": 32},
}
VLLM_RESPONSES = {
    "input_tokens": 1985,
    "input_tokens_details": {
        "cached_tokens": 1952,
        "cache_write_tokens": 32,
        "input_tokens_per_turn": [],
        "cached_tokens_per_turn": [],
    },
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 1989,
}
DYNAMO_COLD = {"input_tokens": 892, "output_tokens": 6, "cache_creation_input_tokens": 0}  # Dynamo 1.6.1, run for this
DYNAMO_WARM = {**DYNAMO_COLD, "input_tokens": 12, "cache_read_input_tokens": 880}
DYNAMO_RUNNING = {**DYNAMO_WARM, "output_tokens": 1, "total_tokens": 893}  # as each of a stream's deltas has it
DYNAMO_RESPONSES = {
    "input_tokens": 656,
    "input_tokens_details": {"cached_tokens": 640},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 661,
}
OPENAI_CHAT = {  # platform.openai.com/docs/guides/prompt-caching, the example of chat completions
    "prompt_tokens": 2006,
    "completion_tokens": 300,
    "total_tokens": 2306,
    "prompt_tokens_details": {"cached_tokens": 1920},
    "completion_tokens_details": {"reasoning_tokens": 0},
}
OPENAI_RESPONSES = {  # the same page on GPT-5.6: 2,000 read, 400 written, 200 neither; the output is made up
    "input_tokens": 2600,
    "input_tokens_details": {"cached_tokens": 2000, "cache_write_tokens": 400},
    "output_tokens": 300,
    "output_tokens_details": {"reasoning_tokens": 64},
    "total_tokens": 2900,
}
SGLANG = {  # ai-dynamo/dynamo pull request 10925: SGLang 0.5.13 with --enable-cache-report
    "completion_tokens": 4,
    "prompt_tokens": 516,
    "prompt_tokens_details": {"audio_tokens": None, "cached_tokens": 512},
    "total_tokens": 520,
}
SGLANG_SILENT = {**SGLANG, "prompt_tokens_details": None}  # noonghunna/club-3090 issue 1297: without it null, always
DEEPSEEK = {  # api-docs.deepseek.com/guides/kv_cache names the fields; the body is mozilla-ai/any-llm issue 795
    "prompt_tokens": 100,
    "prompt_cache_hit_tokens": 80,
    "prompt_cache_miss_tokens": 20,
    "completion_tokens": 50,
    "total_tokens": 150,
}
MOONSHOT = {  # platform.kimi.ai/docs/api/chat
    "prompt_tokens": 19,
    "completion_tokens": 21,
    "total_tokens": 40,
    "cached_tokens": 10,
}
MOONSHOT_TWICE = {  # AstrBotDevs/AstrBot issue 6614: told in both places
    "prompt_tokens": 1336,
    "completion_tokens": 31,
    "total_tokens": 1367,
    "cached_tokens": 1280,
    "prompt_tokens_details": {"cached_tokens": 1280},
}
GEMINI = {  # BerriAI/litellm issue 10667; the thoughts, cut off there, are what its total has beyond the others
    "promptTokenCount": 19588,
    "candidatesTokenCount": 69,
    "totalTokenCount": 19801,
    "cachedContentTokenCount": 18403,
    "thoughtsTokenCount": 144,
}
GEMINI_THOUGHT_ONLY = {  # router-for-me/CLIProxyAPI issue 5733: zeros are left out, the total says so
    "promptTokenCount": 21,
    "thoughtsTokenCount": 60,
    "totalTokenCount": 81,
}
GEMINI_NO_TOTAL = {"promptTokenCount": 9, "candidatesTokenCount": 2, "thoughtsTokenCount": 3}  # made up
GEMINI_AS_OPENAI = {  # mozilla-ai/any-llm issue 1290: its OpenAI face tells no thoughts, but counts them in the total
    "prompt_tokens": 20,
    "completion_tokens": 198,
    "total_tokens": 623,
}
BEDROCK_PLAIN = {  # as a Converse call without cache points answers
    "inputTokens": 15,
    "outputTokens": 395,
    "totalTokens": 410,
    "cacheReadInputTokens": 0,
    "cacheWriteInputTokens": 0,
}
BEDROCK = {  # AWS API_runtime_TokenUsage; input is the rest: its prompt-caching guide. Made-up numbers
    "inputTokens": 10,
    "outputTokens": 50,
    "totalTokens": 1360,
    "cacheReadInputTokens": 800,
    "cacheWriteInputTokens": 500,
    "cacheDetails": [{"inputTokens": 200, "ttl": "1h"}, {"inputTokens": 300, "ttl": "5m"}],
}
OPENROUTER = {  # openrouter.ai/docs/use-cases/usage-accounting
    "completion_tokens": 2,
    "completion_tokens_details": {"reasoning_tokens": 0},
    "cost": 0.95,
    "cost_details": {"upstream_inference_cost": 19},
    "prompt_tokens": 194,
    "prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 100, "audio_tokens": 0},
    "total_tokens": 196,
}
XAI = {  # Wei-Shaw/sub2api issue 5771: reasoning beside the completion
    "prompt_tokens": 10120,
    "completion_tokens": 1499,
    "total_tokens": 14428,
    "prompt_tokens_details": {"cached_tokens": 128},
    "completion_tokens_details": {"reasoning_tokens": 2809},
}
LITELLM = {  # docs.litellm.ai/docs/completion/prompt_caching: prompt_tokens are all of it
    "prompt_tokens": 2006,
    "completion_tokens": 300,
    "total_tokens": 2306,
    "prompt_tokens_details": {"cached_tokens": 1920},
    "completion_tokens_details": {"reasoning_tokens": 0},
    "cache_creation_input_tokens": 0,
}
LITELLM_REST = {  # BerriAI/litellm issue 15056: prompt_tokens were the rest, the total counts nothing else
    "completion_tokens": 467,
    "prompt_tokens": 31,
    "total_tokens": 498,
    "prompt_tokens_details": {"cached_tokens": 0},
    "cache_creation_input_tokens": 1253,
    "cache_read_input_tokens": 0,
}
LITELLM_SPLIT = {  # its layout of late, everything in two places or three; made-up numbers
    "prompt_tokens": 117,
    "completion_tokens": 5,
    "total_tokens": 122,
    "prompt_tokens_details": {
        "cached_tokens": 80,
        "cache_write_tokens": 30,
        "cache_creation_tokens": 30,
        "cache_creation_token_details": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
    },
    "cache_creation_input_tokens": 30,
    "cache_read_input_tokens": 80,
}
PORTKEY = {  # Portkey-AI/gateway issue 1191: prompt_tokens are the rest, the total counts the write
    "prompt_tokens": 4,
    "completion_tokens": 97,
    "total_tokens": 2922,
    "cache_read_input_tokens": 0,
    "cache_creation_input_tokens": 2821,
}
PORTKEY_LONG = {**PORTKEY, "prompt_tokens": 3000, "total_tokens": 5918}  # made up: only the total tells
QWEN = {  # alibabacloud.com/help/en/model-studio/context-cache: an explicit cache made, as LiteLLM's tests have it
    "prompt_tokens": 2059,
    "completion_tokens": 201,
    "total_tokens": 2260,
    "prompt_tokens_details": {
        "cached_tokens": 0,
        "text_tokens": 2059,
        "cache_type": "ephemeral",
        "cache_creation_input_tokens": 2048,
        "cache_creation": {"ephemeral_5m_input_tokens": 2048},
    },
    "completion_tokens_details": {"reasoning_tokens": 170},
}
