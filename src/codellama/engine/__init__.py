"""The engine: token ids in, token ids out."""

from codellama.engine.engine import Engine
from codellama.engine.sampling import SamplingParams
from codellama.engine.sequence import Completion, Piece

__all__ = ["Completion", "Engine", "Piece", "SamplingParams"]
