"""vLLM's door to radlads (docs/vllm.md): vLLM finds it by an entry point, and nothing in radlads imports it.

It imports vLLM and radlads.model only. So a machine that serves models needs no part of radlads that trains them.
"""
