"""Conversations to prompts, by the model's own template: the sandbox it runs in, and how a user's text stays text.

Pure but for the child that runs it (inference/chat/child.py): no Django, no Redis. The web only builds a ChatPrompt and
asks the tokenizer pool; templates are rendered in the tokenizer's child, and checked in a child of the registry's.
"""
