"""Serving for Megatron models under traffic that mixes short chats with million-token documents."""

__version__ = "0.1.0"
