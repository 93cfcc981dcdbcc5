"""Text to ids and back, and every prompt format."""

from .infilling import infilling_example, infilling_prompt, split_fill
from .tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "infilling_example", "infilling_prompt", "split_fill"]
