"""Anthropic's dialect: /v1/messages and the counting of its tokens."""
